"""What the linear kinds share: the fitted probes, standardised principal axes, and one solver for smooth convex losses.

Method:
    1. Standardise each feature by the mean and standard deviation of the rows given, which are training rows only.
    2. Rotate the rows onto their principal axes. An L2 penalty does not feel a rotation and the weights lie in the span of
       the rows, so min(rows, d) coordinates are enough: it does not matter that d exceeds the rows by far.
    3. A loss whose second derivative is at most c has, on these axes, a Hessian of at most c·(variance) + penalty, which is
       diagonal (Böhning and Lindsay 1988, https://doi.org/10.1007/BF00049423). Dividing the gradient by it always goes
       downhill: no line search, no factorisation per step, and all models and strengths share two matrix products per step.
    4. Accelerate with Nesterov's momentum, started afresh whenever it points uphill
       (O'Donoghue and Candès 2012, https://arxiv.org/abs/1204.3982).

Everything is float64: residual streams have a few directions thousands of times larger than the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

TOLERANCE = 1e-7
"""Stop when a step is this short, measured by the bound of step 3; decision scores are then right to about 1e-4."""

MAX_STEPS = 20_000
"""Far more than is needed: under 300 steps for C up to 1, under 2,000 for C up to 100."""


@dataclass(frozen=True)
class LinearProbes:
    """Fitted probes, one per model (a key at a position) and strength.

    Attributes:
        weight: directions in standardised features, `[models, strengths, outputs, d]`.
        bias: intercepts, `[models, strengths, outputs]`.
        mean: subtracted from the features, `[models, d]`.
        scale: what they are then divided by, `[models, d]`.
    """

    weight: Float[Tensor, "models strengths outputs d"]
    bias: Float[Tensor, "models strengths outputs"]
    mean: Float[Tensor, "models d"]
    scale: Float[Tensor, "models d"]

    def scores(self, X: Float[Tensor, "models rows d"]) -> Float[Tensor, "models strengths outputs rows"]:
        """Return the scores of rows: log-odds, a value, or a logit per class."""
        Z = (X.double() - self.mean[:, None]) / self.scale[:, None]
        return (self.weight.flatten(1, 2) @ Z.mT).unflatten(1, self.weight.shape[1:3]) + self.bias[..., None]


@dataclass(frozen=True)
class Axes:
    """Standardised rows in principal coordinates.

    Attributes:
        rotated: `[models, rows, axes]`, centred, its columns orthogonal.
        axes: `[models, d, axes]`: `rotated = standardised @ axes`.
        mean: `[models, d]`.
        scale: `[models, d]`.
    """

    rotated: Float[Tensor, "models rows axes"]
    axes: Float[Tensor, "models d axes"]
    mean: Float[Tensor, "models d"]
    scale: Float[Tensor, "models d"]

    @classmethod
    def of(cls, X: Float[Tensor, "models rows d"]) -> "Axes":
        """Standardise and rotate rows."""
        X = X.double()
        mean = X.mean(1)
        deviation = X.std(1, correction=0)
        scale = torch.where(deviation > 0, deviation, 1.0)  # a constant feature becomes 0, not nan
        return cls(*principal_axes((X - mean[:, None]) / scale[:, None]), mean, scale)

    def probes(
        self, weight: Float[Tensor, "models strengths outputs axes"], bias: Float[Tensor, "models strengths outputs"]
    ) -> LinearProbes:
        """Return probes whose weights are given on the axes."""
        back = (weight.flatten(1, 2) @ self.axes.mT).unflatten(1, weight.shape[1:3])
        return LinearProbes(back, bias, self.mean, self.scale)


def principal_axes(
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


def minimise(
    rotated: Float[Tensor, "models rows axes"],
    residual: Callable[
        [Float[Tensor, "models rows strengths outputs"]], Float[Tensor, "models rows strengths outputs"]
    ],
    curvature: float,
    C: Float[Tensor, "strengths"],
    outputs: int = 1,
    *,
    intercept: bool = True,
) -> Float[Tensor, "models axes+1 strengths outputs"]:
    """Return the minimum of ½‖w‖² + C·loss for each model and strength; the last coordinate is the intercept.

    Args:
        rotated: rows in principal coordinates.
        residual: the loss's derivative at the scores.
        curvature: the most that the loss's second derivative can be.
        C: strengths.
        outputs: scores per row.
        intercept: whether there is one; it is not penalised.

    Raises:
        RuntimeError: if it does not converge.
    """
    models, rows, axes = rotated.shape
    ones = rotated.new_ones if intercept else rotated.new_zeros
    inputs = torch.cat([rotated, ones(models, rows, 1)], dim=-1)
    last = C.new_zeros(1, len(C), 1) if intercept else C.new_ones(1, len(C), 1)
    penalty = torch.cat([(1 / C)[:, None].expand(axes, -1, 1), last])
    bound = curvature * inputs.square().sum(1)[..., None, None] + penalty

    point = ahead = rotated.new_zeros(models, axes + 1, len(C), outputs)
    momentum = bound.new_ones(models, 1, len(C), 1)
    for _ in range(MAX_STEPS):
        scores = (inputs @ ahead.flatten(2)).unflatten(2, ahead.shape[2:])
        gradient = (inputs.mT @ residual(scores).flatten(2)).unflatten(2, ahead.shape[2:]) + penalty * ahead
        step = gradient / bound
        if (gradient * step).sum((1, 3)).max() < TOLERANCE**2:
            return ahead
        previous, point = point, ahead - step
        move = point - previous
        uphill = (gradient * move).sum((1, 3), keepdim=True) > 0
        grown = (1 + (1 + 4 * momentum**2).sqrt()) / 2
        ahead = point + torch.where(uphill, 0.0, (momentum - 1) / grown) * move
        momentum = torch.where(uphill, 1.0, grown)
    raise RuntimeError(f"no convergence in {MAX_STEPS} steps for C up to {float(C.max())}; choose a smaller C")


def check_two_classes(y: Tensor) -> None:
    """Refuse labels of one class.

    Raises:
        ValueError: if `y` has one class only: the intercept would have no bound.
    """
    if bool(y.all()) or not bool(y.any()):
        raise ValueError(f"y has one class only: {int(y.sum())} of {len(y)} rows are True")
