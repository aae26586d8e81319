"""Shared by the linear kinds: the fitted probes, and standardized rows on their principal axes.

Method:
    1. Standardize each feature by the mean and standard deviation of the given rows, which are training rows only.
    2. Rotate the rows onto their principal axes. An L2 penalty is invariant under rotation and the weights lie in the span of
       the rows, so min(rows, d) coordinates suffice, even if d is much larger than the number of rows. On these axes the
       covariance is diagonal, which turns ridge regression and LDA into a division and simplifies the others (`newton`).

Everything is float64: residual streams have a few directions thousands of times larger than the rest.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class LinearProbes:
    """Fitted probes, one per model (a key at a position) and strength."""

    weight: Float[Tensor, "models strengths outputs d"]
    """Directions in standardized features, `[models, strengths, outputs, d]`."""
    bias: Float[Tensor, "models strengths outputs"]
    """Intercepts, `[models, strengths, outputs]`."""
    mean: Float[Tensor, "models d"]
    """Subtracted from the features, `[models, d]`."""
    scale: Float[Tensor, "models d"]
    """What they are then divided by, `[models, d]`."""

    def scores(self, X: Float[Tensor, "models rows d"]) -> Float[Tensor, "models strengths outputs rows"]:
        """Return the scores of rows: log-odds, a value, or a logit per class."""
        Z = (X.double() - self.mean[:, None]) / self.scale[:, None]
        scores: Tensor = (self.weight.flatten(1, 2) @ Z.mT).unflatten(1, self.weight.shape[1:3]) + self.bias[..., None]
        return scores


@dataclass(frozen=True)
class Standardized:
    """Rows whose features have mean 0 and standard deviation 1."""

    Z: Float[Tensor, "models rows d"]
    """`[models, rows, d]`."""
    mean: Float[Tensor, "models d"]
    """Subtracted, `[models, d]`."""
    scale: Float[Tensor, "models d"]
    """Then divided by, `[models, d]`."""

    @classmethod
    def of(cls, X: Float[Tensor, "models rows d"]) -> "Standardized":
        """Standardise rows."""
        mean = X.double().mean(1)
        centered = X - mean[:, None]
        deviation = centered.square().mean(1).sqrt()
        scale = scale_of(deviation, mean, X.shape[1])
        return cls(centered / scale[:, None], mean, scale)


def scale_of(
    deviation: Float[Tensor, "models d"], mean: Float[Tensor, "models d"], rows: int
) -> Float[Tensor, "models d"]:
    """Return the divisor of each feature: its standard deviation, or 1 if that is rounding error of a constant."""
    return torch.where(deviation > rows * torch.finfo(torch.float64).eps * mean.abs(), deviation, 1.0)


@dataclass(frozen=True)
class Axes:
    """Standardized rows in principal coordinates."""

    rotated: Float[Tensor, "models rows axes"]
    """`[models, rows, axes]`, centered, its columns orthogonal."""
    back: tuple[Float[Tensor, "models _ _"], ...]
    """Matrices whose product, `[models, axes, d]`, has the axes as rows: weights on the axes times each matrix in turn are
    weights of the features. They are not multiplied out, which would cost more than everything else."""
    mean: Float[Tensor, "models d"]
    """`[models, d]`."""
    scale: Float[Tensor, "models d"]
    """`[models, d]`."""

    @classmethod
    def of(cls, X: Float[Tensor, "models rows d"]) -> "Axes":
        """Standardise and rotate rows."""
        rows = Standardized.of(X)
        Z = rows.Z
        if Z.shape[2] <= Z.shape[1]:
            axes = torch.linalg.eigh(Z.mT @ Z).eigenvectors
            return cls(Z @ axes, (axes.mT,), rows.mean, rows.scale)
        # The eigenvectors of the smaller matrix give the same axes. Axes of zero length (centered rows have at least one)
        # must not be scaled up to arbitrary unit vectors.
        squared, directions = torch.linalg.eigh(Z @ Z.mT)
        length = squared.clamp_min(0).sqrt()[:, None]
        dual = directions / length.clamp_min(1e-7 * length.amax().clamp_min(1e-300))
        return cls(directions * length, (dual.mT, Z), rows.mean, rows.scale)

    def probes(
        self, weight: Float[Tensor, "models strengths outputs axes"], bias: Float[Tensor, "models strengths outputs"]
    ) -> LinearProbes:
        """Return probes whose weights are given on the axes."""
        flat = weight.flatten(1, 2)
        for matrix in self.back:
            flat = flat @ matrix
        return LinearProbes(flat.unflatten(1, weight.shape[1:3]), bias, self.mean, self.scale)


def check_two_classes(y: Tensor) -> None:
    """Check that labels have two classes.

    Raises:
        ValueError: if `y` has one class only, for which the intercept is unbounded.
    """
    if bool(y.all()) or not bool(y.any()):
        raise ValueError(f"y has one class only: {int(y.sum())} of {len(y)} rows are True")
