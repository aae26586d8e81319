"""Difference of means: from the mean of the incorrect answers to the mean of the correct ones.

Method:
    1. w = μ₁ − μ₀ on the raw features, not standardized (Marks and Tegmark 2023, https://arxiv.org/abs/2310.06824; used to
       read correctness at the end of the prompt in https://arxiv.org/abs/2509.10625).
    2. Its length and the intercept come from a logistic regression on the projection alone, so that scores are log-odds.

Regularization: none. The direction involves no choice, which is why it often transfers best to other data.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.kinds import logistic
from probes.kinds.linear import LinearProbes, check_two_classes

C = 1.0
"""C of the logistic regression on one standardized feature: almost no penalty."""


def fit(
    X: Float[Tensor, "models rows d"],
    y: Bool[Tensor, "rows"],
    groups: Int[Tensor, "rows"] | None,
    strengths: Float[Tensor, "strengths"],
) -> LinearProbes:
    """Fit a probe for every model; all strengths are the same.

    Args:
        X: features; the models see the same rows.
        y: labels of the rows.
        groups: not used.
        strengths: only their number counts.

    Raises:
        ValueError: if `y` has one class only.
    """
    check_two_classes(y)
    X = X.double()
    mean = X.mean(1)
    direction = torch.nn.functional.normalize(X[:, y].mean(1) - X[:, ~y].mean(1), dim=-1)
    projected = ((X - mean[:, None]) * direction[:, None]).sum(-1, keepdim=True)
    line = logistic.fit(projected, y, None, torch.tensor([C], device=X.device))
    slope = line.weight[:, 0, 0] / line.scale
    bias = line.bias[:, :, 0] - slope * line.mean
    models, n = len(X), len(strengths)
    weight = (direction * slope)[:, None, None].expand(models, n, 1, -1)
    return LinearProbes(weight, bias[:, :, None].expand(models, n, 1), mean, torch.ones_like(mean))
