"""Linear discriminant analysis with a shrunk covariance: the difference of means, whitened.

w = Σ⁻¹(μ₁ − μ₀), b = log(n₁/n₀) − ½ w·(μ₁ + μ₀), with Σ = (1 − s)·Σw + s·tr(Σw)/d·I and Σw the covariance within classes:
scikit-learn's `LinearDiscriminantAnalysis(solver="lsqr", shrinkage=s)` on standardized features (Ledoit and Wolf 2004,
https://doi.org/10.1016/S0047-259X(03)00096-4, for the form of the shrinkage). Strength: s.

On principal axes the total covariance is diagonal, and Σw differs from it only along μ₁ − μ₀, so the inverse is a
division and a Sherman-Morrison correction, for all models and strengths at once.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.kinds.linear import Axes, LinearProbes, check_two_classes


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
        strengths: values of s, above 0 and at most 1.

    Raises:
        ValueError: if `y` has one class only.
    """
    check_two_classes(y)
    rows = Axes.of(X)
    n, d = X.shape[1:]
    share = y.double().mean()
    high, low = rows.rotated[:, y].mean(1), rows.rotated[:, ~y].mean(1)
    apart = (high - low)[:, None]
    between = share * (1 - share)
    total = rows.rotated.square().sum(1) / n
    average = (total.sum(-1) - between * apart.square().sum((1, 2))) / d
    s = strengths.double()[:, None]
    diagonal = (1 - s) * total[:, None] + s * average[:, None, None]
    weight = torch.where(diagonal > 0, apart / diagonal, 0.0)  # 0 if all features are constant
    weight = weight / (1 - (1 - s) * between * (apart * weight).sum(-1, keepdim=True))
    bias = (share / (1 - share)).log() - (weight * (high + low)[:, None]).sum(-1) / 2
    return rows.probes(weight[:, :, None], bias[:, :, None])
