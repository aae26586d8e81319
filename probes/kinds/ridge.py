"""Ridge regression, for numeric targets.

The objective is scikit-learn's: ‖y − w·z − b‖² + α‖w‖², with standardized z and unpenalized b. Strength: α. On principal
axes the solution is a division.
"""

from jaxtyping import Float, Int
from torch import Tensor

from probes.kinds.linear import Axes, LinearProbes


def fit(
    X: Float[Tensor, "models rows d"],
    y: Float[Tensor, "rows"],
    groups: Int[Tensor, "rows"] | None,
    strengths: Float[Tensor, "strengths"],
) -> LinearProbes:
    """Fit a probe for every model and strength; scores are in units of `y`.

    Args:
        X: features; the models see the same rows.
        y: the number of each row.
        groups: not used.
        strengths: values of α, which have to be above 0.
    """
    rows = Axes.of(X)
    y = y.double()
    mean = y.mean()
    squared = rows.rotated.square().sum(1)
    along = rows.rotated.mT @ (y - mean)
    weight = along[:, None] / (squared[:, None] + strengths.double()[:, None])
    return rows.probes(weight[:, :, None], mean.expand(len(X), len(strengths), 1))
