"""Softmax-attention pooling over tokens: learns where a sample shows its label, together with how.

Method:
    1. Standardize by the mean and standard deviation over all training tokens, and clip to ±8: a few tokens (often the first)
       have norms a hundred times the others', and would dominate the softmax.
    2. f = Σₜ softmax(q·zₜ)·(v·zₜ) + b over a sample's tokens; padding has no weight.
    3. Minimize ½‖v‖² + ½‖q‖² + C Σ log(1 + exp(−s·f)) by L-BFGS with a line search (Nocedal and Wright, Numerical Optimization,
       7.2). q starts at 0, which is mean pooling; the objective is not convex, and the result is the local minimum near that.
       Each model and strength is optimized separately, so that results do not depend on the batch. Strength: C.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.kinds.linear import check_two_classes, scale_of

CLIP = 8.0
ITERATIONS = 200


@dataclass(frozen=True)
class AttentionProbes:
    """Fitted probes, one per model and strength."""

    query: Float[Tensor, "models strengths d"]
    """What to attend to, in standardized features, `[models, strengths, d]`."""
    value: Float[Tensor, "models strengths d"]
    """What to read there, `[models, strengths, d]`."""
    bias: Float[Tensor, "models strengths"]
    """Intercepts, `[models, strengths]`."""
    mean: Float[Tensor, "models d"]
    """Subtracted from the features, `[models, d]`."""
    scale: Float[Tensor, "models d"]
    """What they are then divided by, `[models, d]`."""

    def scores(self, X: Float[Tensor, "models rows tokens d"]) -> Float[Tensor, "models strengths 1 rows"]:
        """Return the log-odds of samples; tokens that are NaN are padding."""
        Z, there = _standardized(X, self.mean, self.scale)
        return _pooled(Z, there, self.query, self.value, self.bias)[:, :, None]

    def attention(self, X: Float[Tensor, "models rows tokens d"]) -> Float[Tensor, "models strengths rows tokens"]:
        """Return the weight of each token; a sample's weights sum to 1."""
        return _weights(*_standardized(X, self.mean, self.scale), self.query)


def fit(
    X: Float[Tensor, "models rows tokens d"],
    y: Bool[Tensor, "rows"],
    groups: Int[Tensor, "rows"] | None,
    strengths: Float[Tensor, "strengths"],
) -> AttentionProbes:
    """Fit a probe for every model and strength.

    Args:
        X: every token of each sample, padded with NaN.
        y: labels of the samples.
        groups: not used.
        strengths: values of C.

    Raises:
        ValueError: if `y` has one class only.
    """
    check_two_classes(y)
    mean = X.double().nanmean((1, 2))
    spread = (X.double() - mean[:, None, None]).square().nanmean((1, 2)).sqrt()
    scale = scale_of(spread, mean, X.shape[1] * X.shape[2])
    Z, there = _standardized(X, mean, scale)
    fitted = [
        [_fit_one(Z[model : model + 1], there[model : model + 1], y, C) for C in strengths.tolist()]
        for model in range(len(X))
    ]
    query, value, bias = (
        torch.stack([torch.cat([probe[part] for probe in of_model]) for of_model in fitted]).double()
        for part in range(3)
    )
    return AttentionProbes(query, value, bias, mean, scale)


def _fit_one(
    Z: Float[Tensor, "1 rows tokens d"], there: Bool[Tensor, "1 rows tokens"], y: Bool[Tensor, "rows"], C: float
) -> tuple[Float[Tensor, "1 d"], Float[Tensor, "1 d"], Float[Tensor, "1"]]:
    """Return the query, the value and the intercept of one model and strength."""
    query, value = (Z.new_zeros(1, Z.shape[-1], requires_grad=True) for _ in range(2))
    bias = Z.new_zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [query, value, bias], max_iter=ITERATIONS, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )
    target = y.to(Z)

    def objective() -> Tensor:
        optimizer.zero_grad()
        scores = _pooled(Z, there, query[None], value[None], bias[None])[0, 0]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(scores, target, reduction="sum")
        total = C * loss + (query.square() + value.square()).sum() / 2
        total.backward()
        return total

    optimizer.step(objective)
    return query.detach(), value.detach(), bias.detach()


def _standardized(
    X: Float[Tensor, "models rows tokens d"], mean: Float[Tensor, "models d"], scale: Float[Tensor, "models d"]
) -> tuple[Float[Tensor, "models rows tokens d"], Bool[Tensor, "models rows tokens"]]:
    there = ~X[..., 0].isnan()
    Z = ((X - mean[:, None, None]) / scale[:, None, None]).clamp(-CLIP, CLIP)
    return Z.masked_fill(~there[..., None], 0.0).float(), there


def _weights(
    Z: Float[Tensor, "models rows tokens d"],
    there: Bool[Tensor, "models rows tokens"],
    query: Float[Tensor, "models strengths d"],
) -> Float[Tensor, "models strengths rows tokens"]:
    logits = torch.einsum("mrtd,msd->msrt", Z, query.to(Z))
    return logits.masked_fill(~there[:, None], -torch.inf).softmax(-1)


def _pooled(
    Z: Float[Tensor, "models rows tokens d"],
    there: Bool[Tensor, "models rows tokens"],
    query: Float[Tensor, "models strengths d"],
    value: Float[Tensor, "models strengths d"],
    bias: Float[Tensor, "models strengths"],
) -> Float[Tensor, "models strengths rows"]:
    read = torch.einsum("mrtd,msd->msrt", Z, value.to(Z))
    return (_weights(Z, there, query) * read).sum(-1) + bias.to(Z)[..., None]
