"""Group-centered logistic regression: distinguishes a problem's correct attempts from its incorrect ones.

Method:
    1. Keep the problems that have attempts of both classes.
    2. Subtract each problem's mean from its rows. This removes what all attempts at a problem share (its topic, length and
       difficulty) and leaves the differences between attempts.
    3. Fit a logistic regression with an L2 penalty and no intercept. Strength: C, as in `logistic`.

Scores of attempts at one problem are comparable, those of different problems are not, so the probe is evaluated by the
AUROC within problems. It is a conditional (fixed-effects) logistic regression with the effects projected out instead of
conditioned on.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.kinds.linear import LinearProbes, Standardized
from probes.kinds.logistic import LogLoss
from probes.kinds.newton import minimize


def fit(
    X: Float[Tensor, "models rows d"],
    y: Bool[Tensor, "rows"],
    groups: Int[Tensor, "rows"],
    strengths: Float[Tensor, "strengths"],
) -> LinearProbes:
    """Fit a probe for every model and strength.

    Args:
        X: features; the models see the same rows.
        y: labels of the rows.
        groups: the problem of each row.
        strengths: values of C.

    Raises:
        ValueError: if no problem has rows of both classes.
        NoConvergenceError: if the fit does not converge.
    """
    _, group = torch.unique(groups, return_inverse=True)
    n = torch.bincount(group)
    trues = torch.bincount(group, weights=y.double())
    mixed = ((trues > 0) & (trues < n))[group]
    if not bool(mixed.any()):
        raise ValueError("no problem has attempts of both classes, so no problem has attempts to compare")
    X = X.double()
    sums = X.new_zeros(len(X), len(n), X.shape[-1]).index_add_(1, group, X)
    centered = (X - (sums / n[:, None])[:, group])[:, mixed]
    rows = Standardized.of(centered)  # the mean of what is centered is 0: only the scale is new
    target = y[mixed].double()[None, None]
    loss = LogLoss(target, torch.ones_like(target))
    weight, bias = minimize(rows.Z, loss, strengths, intercept=False)
    return LinearProbes(weight, bias, X.mean(1), rows.scale)
