"""Multinomial logistic regression with an L2 penalty: which of several classes.

The objective is scikit-learn's: ½‖W‖² + C Σ −log softmax(W·z + b)[y], z standardised, b not penalised. Strength: C. Its Hessian
in the scores is at most ½ (Böhning 1992, https://doi.org/10.1007/BF00048682); `linear` says how it is minimised.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.kinds.linear import Axes, LinearProbes, minimise


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
        RuntimeError: if the fit does not converge.
    """
    counts = torch.bincount(y)
    if len(counts) < 2 or bool((counts == 0).any()):
        raise ValueError(
            f"y has to have rows of every class and at least two classes; rows per class: {counts.tolist()}"
        )
    rows = Axes.of(X)
    target = torch.nn.functional.one_hot(y).double()[:, None]
    solution = minimise(
        rows.rotated, lambda f: torch.softmax(f, -1) - target, 0.5, strengths.double(), outputs=len(counts)
    )
    return rows.probes(solution[:, :-1].permute(0, 2, 3, 1), solution[:, -1])
