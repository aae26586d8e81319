"""Logistic regression with an L2 penalty.

The objective is scikit-learn's: ½‖w‖² + C Σ log(1 + exp(−s·f)), with f = w·z + b, standardized z, s = ±1, and unpenalized
b. Strength: C. `newton` describes the solver.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.kinds.linear import LinearProbes, Standardized, check_two_classes
from probes.kinds.newton import PerProblem, PerRow, minimize


@dataclass(frozen=True)
class LogLoss:
    """Σ weight·(log(1 + exp(f)) − y·f)."""

    y: Float[Tensor, "problems 1 rows"]
    """Labels, 0 or 1, `[problems, 1, rows]`."""
    weight: Float[Tensor, "problems 1 rows"]
    """Of each row in each problem, likewise."""

    def value(self, f: PerRow) -> PerProblem:
        """Return the loss."""
        return (self.weight * (torch.nn.functional.softplus(f) - self.y * f)).sum((2, 3), keepdim=True)

    def slope(self, f: PerRow) -> PerRow:
        """Return its derivative by each score."""
        return self.weight * (torch.sigmoid(f) - self.y)

    def curvature(self, f: PerRow) -> Callable[[PerRow], PerRow]:
        """Return what multiplies by its second derivative."""
        said = torch.sigmoid(f)
        curve = (self.weight * said * (1 - said)).float()
        return lambda h: curve * h


def fit(
    X: Float[Tensor, "models rows d"],
    y: Bool[Tensor, "rows"],
    groups: Int[Tensor, "rows"] | None,
    strengths: Float[Tensor, "strengths"],
) -> LinearProbes:
    """Fit a probe for every model and strength; scores are log-odds.

    Args:
        X: features; the models see the same rows.
        y: labels of the rows.
        groups: not used.
        strengths: values of C: the smaller, the stronger the penalty.

    Raises:
        ValueError: if `y` has one class only.
        NoConvergenceError: if the fit does not converge.
    """
    return fit_together(X, y[None], torch.ones_like(y)[None], strengths)


def fit_together(
    X: Float[Tensor, "models rows d"],
    y: Bool[Tensor, "labelings rows"],
    trains: Bool[Tensor, "labelings rows"],
    strengths: Float[Tensor, "strengths"],
) -> LinearProbes:
    """Fit a probe for every model, labeling and strength; all rows standardise, whether they train or not.

    Args:
        X: features; the models see the same rows.
        y: labels of the rows.
        trains: which rows train.
        strengths: values of C.

    Raises:
        ValueError: if `y` has one class only where it trains.
        NoConvergenceError: if the fit does not converge.
    """
    for labels, part in zip(y, trains, strict=True):
        check_two_classes(labels[part])
    rows = Standardized.of(X)
    loss = LogLoss(*(part.double()[:, None] for part in (y, trains)))
    weight, bias = minimize(rows.Z, loss, strengths, len(y))
    return LinearProbes(weight, bias, rows.mean, rows.scale)
