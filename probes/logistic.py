"""Logistic regression with an L2 penalty: one probe per layer and strength, all fitted together.

The objective is scikit-learn's: ½‖w‖² + C Σ log(1 + exp(−s·f)), with f = w·z + b, s = ±1, and b not penalised.

Method:
    1. Standardise each feature by the mean and standard deviation of the rows given, which are training rows only.
    2. Rotate the rows onto their principal axes. The penalty does not feel a rotation and w lies in the span of the
       rows, so min(rows, d) coordinates are enough: it does not matter that d exceeds the rows by far.
    3. The logistic loss never curves more than ¼, so on these axes ¼·(variance) + 1/C, a diagonal, bounds the Hessian
       (Böhning and Lindsay 1988, https://doi.org/10.1007/BF00049423). Dividing the gradient by it always goes
       downhill: no line search, no factorisation per step, and all layers and strengths share two matrix products per
       step.
    4. Accelerate with Nesterov's momentum, started afresh whenever it points uphill
       (O'Donoghue and Candès 2012, https://arxiv.org/abs/1204.3982).

Everything is float64: residual streams have a few directions thousands of times larger than the rest.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

TOLERANCE = 1e-7
"""Stop when a step is this short, measured by the bound of step 3; decision scores are then right to about 1e-4."""

MAX_STEPS = 20_000
"""Far more than is needed: under 300 steps for C up to 1, under 2,000 for C up to 100."""


@dataclass(frozen=True)
class LogisticProbes:
    """Fitted probes, one per model (a layer, say) and strength.

    Attributes:
        weight: directions in standardised features, `[models, strengths, d]`.
        bias: intercepts, `[models, strengths]`.
        mean: subtracted from the features, `[models, d]`.
        scale: what they are then divided by, `[models, d]`.
    """

    weight: Float[Tensor, "models strengths d"]
    bias: Float[Tensor, "models strengths"]
    mean: Float[Tensor, "models d"]
    scale: Float[Tensor, "models d"]

    def scores(self, X: Float[Tensor, "models rows d"]) -> Float[Tensor, "models strengths rows"]:
        """Return the decision scores (log-odds) of rows."""
        Z = (X.double() - self.mean[:, None]) / self.scale[:, None]
        return self.weight @ Z.mT + self.bias[..., None]


def fit(
    X: Float[Tensor, "models rows d"], y: Bool[Tensor, "rows"], strengths: Float[Tensor, "strengths"]
) -> LogisticProbes:
    """Fit a probe for every model and strength.

    Args:
        X: features; the models see the same rows.
        y: labels of the rows.
        strengths: values of C: the smaller, the stronger the penalty.

    Raises:
        ValueError: if `y` has one class only: the intercept would have no bound.
        RuntimeError: if the fit does not converge.
    """
    if bool(y.all()) or not bool(y.any()):
        raise ValueError(f"y has one class only: {int(y.sum())} of {len(y)} rows are True")
    X, C = X.double(), strengths.double()
    mean = X.mean(1)
    deviation = X.std(1, correction=0)
    scale = torch.where(deviation > 0, deviation, 1.0)  # a constant feature becomes 0, not nan
    rotated, axes = _principal_axes((X - mean[:, None]) / scale[:, None])
    solution = _minimise(rotated, y.double(), C)
    return LogisticProbes((axes @ solution[:, :-1]).mT, solution[:, -1], mean, scale)


def _principal_axes(
    Z: Float[Tensor, "models rows d"],
) -> tuple[Float[Tensor, "models rows axes"], Float[Tensor, "models d axes"]]:
    """Return the rows in principal coordinates, and the axes: `rotated = Z @ axes`."""
    _, rows, d = Z.shape
    if d <= rows:
        axes = torch.linalg.eigh(Z.mT @ Z).eigenvectors
        return Z @ axes, axes
    # The eigenvectors of the smaller matrix give the same axes. Those without length (centred rows have at least one)
    # must stay short instead of being blown up to arbitrary unit vectors.
    squared, directions = torch.linalg.eigh(Z @ Z.mT)
    length = squared.clamp_min(0).sqrt()[:, None]
    axes = Z.mT @ (directions / length.clamp_min(1e-7 * length.amax().clamp_min(1e-300)))
    return directions * length, axes


def _minimise(
    rotated: Float[Tensor, "models rows axes"], y: Float[Tensor, "rows"], C: Float[Tensor, "strengths"]
) -> Float[Tensor, "models axes+1 strengths"]:
    """Return the minimum of the objective for each model and strength; the last coordinate is the intercept."""
    models, rows, axes = rotated.shape
    inputs = torch.cat([rotated, rotated.new_ones(models, rows, 1)], dim=-1)
    penalty = torch.cat([(1 / C).expand(axes, -1), C.new_zeros(1, len(C))])
    bound = inputs.square().sum(1)[..., None] / 4 + penalty

    point = ahead = torch.zeros_like(bound)
    momentum = bound.new_ones(models, 1, len(C))
    for _ in range(MAX_STEPS):
        gradient = inputs.mT @ (torch.sigmoid(inputs @ ahead) - y[:, None]) + penalty * ahead
        step = gradient / bound
        if (gradient * step).sum(1).max() < TOLERANCE**2:
            return ahead
        previous, point = point, ahead - step
        move = point - previous
        uphill = (gradient * move).sum(1, keepdim=True) > 0
        grown = (1 + (1 + 4 * momentum**2).sqrt()) / 2
        ahead = point + torch.where(uphill, 0.0, (momentum - 1) / grown) * move
        momentum = torch.where(uphill, 1.0, grown)
    raise RuntimeError(f"no convergence in {MAX_STEPS} steps for C up to {float(C.max())}; choose a smaller C")
