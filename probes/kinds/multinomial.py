"""Multinomial logistic regression with an L2 penalty, for several classes.

The objective is scikit-learn's: ½‖W‖² + C Σ −log softmax(W·z + b)[y], with standardized z and unpenalized b. Strength: C.
`newton` describes the solver.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.kinds.linear import LinearProbes, Standardized
from probes.kinds.newton import PerProblem, PerRow, minimize


@dataclass(frozen=True)
class SoftmaxLoss:
    """Σ −log softmax(f)[y]."""

    target: Float[Tensor, "classes rows"]
    """1 at the class of each row, else 0, `[classes, rows]`."""

    def value(self, f: PerRow) -> PerProblem:
        """Return the loss."""
        return (f.logsumexp(2, keepdim=True) - (self.target * f).sum(2, keepdim=True)).sum(3, keepdim=True)

    def slope(self, f: PerRow) -> PerRow:
        """Return its derivative by each score."""
        return f.softmax(2) - self.target

    def curvature(self, f: PerRow) -> Callable[[PerRow], PerRow]:
        """Return what multiplies by its second derivative."""
        said = f.softmax(2).float()
        return lambda h: said * (h - (said * h).sum(2, keepdim=True))


def fit(
    X: Float[Tensor, "models rows d"],
    y: Int[Tensor, "rows"],
    groups: Int[Tensor, "rows"] | None,
    strengths: Float[Tensor, "strengths"],
) -> LinearProbes:
    """Fit a probe for every model and strength; scores are a logit per class.

    Args:
        X: features; the models see the same rows.
        y: class of each row, from 0; every class up to the highest must occur.
        groups: not used.
        strengths: values of C: the smaller, the stronger the penalty.

    Raises:
        ValueError: if there are fewer than two classes, or one that no row has.
        NoConvergenceError: if the fit does not converge.
    """
    counts = torch.bincount(y)
    if len(counts) < 2 or bool((counts == 0).any()):
        raise ValueError(
            f"y has to have rows of every class and at least two classes; rows per class: {counts.tolist()}"
        )
    rows = Standardized.of(X)
    loss = SoftmaxLoss(torch.nn.functional.one_hot(y).double().mT)
    weight, bias = minimize(rows.Z, loss, strengths, outputs=len(counts))
    return LinearProbes(weight, bias, rows.mean, rows.scale)
