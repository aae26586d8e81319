"""Logistic regression with an L2 penalty.

The objective is scikit-learn's: ½‖w‖² + C Σ log(1 + exp(−s·f)), with f = w·z + b, z standardised, s = ±1, and b not penalised.
Strength: C. The loss never curves more than ¼; `linear` says how it is minimised.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.kinds.linear import Axes, LinearProbes, check_two_classes, minimise


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
        RuntimeError: if the fit does not converge.
    """
    check_two_classes(y)
    rows = Axes.of(X)
    target = y.double()[:, None, None]
    solution = minimise(rows.rotated, lambda f: torch.sigmoid(f) - target, 0.25, strengths.double())
    return rows.probes(solution[:, :-1].permute(0, 2, 3, 1), solution[:, -1])
