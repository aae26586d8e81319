"""95% intervals of shares, of their paired differences and of AUROCs, from counts of independent trials.

Those of the kind "estimate ± 1.96 standard errors" have no width where all trials agree, and percentiles of a bootstrap have
none either. These have one, and keep what they promise with few trials. The trials need not be whole numbers: for clustered
samples they are how many independent ones would say as much.
"""

import math

from scipy.optimize import brentq
from scipy.stats import beta

Z_95 = 1.959963984540054
"""Standard normal quantile of a two-sided 95% interval."""


def wilson(p: float, n: float) -> tuple[float, float]:
    """Return Wilson's 95% interval of a share `p` of `n` independent trials."""
    centre = (p + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
    half = Z_95 * math.sqrt(p * (1 - p) / n + Z_95**2 / (4 * n**2)) / (1 + Z_95**2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def exact(p: float, n: float) -> tuple[float, float]:
    """Return Clopper and Pearson's 95% interval of a share `p` of `n` independent trials; neither has to be whole."""
    low = float(beta.ppf(0.025, p * n, (1 - p) * n + 1)) if p > 0 else 0.0
    high = float(beta.ppf(0.975, p * n + 1, (1 - p) * n)) if p < 1 else 1.0
    return low, high


def paired(more: float, less: float, n: float) -> tuple[float, float]:
    """Return Tango's 95% score interval of the difference of two paired proportions.

    Args:
        more: the share of pairs that have it in the first only.
        less: in the second only.
        n: pairs; neither they nor the shares of them have to be whole.
    """

    value, edge = more - less, 1 - 1e-12

    def score(d: float) -> float:
        """Return the score statistic of a difference `d`, which falls as `d` grows."""
        b, away = (2 - more + less) * d - more - less, value - d
        only_second = (math.sqrt(max(0.0, b * b + 8 * less * d * (1 - d))) - b) / 4  # the likeliest share, given d
        variance = max(0.0, 2 * only_second + d * (1 - d)) / n
        return away / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, away) if away else 0.0

    low = brentq(lambda d: score(d) - Z_95, -edge, value) if value > -edge and score(-edge) > Z_95 else -1.0
    high = brentq(lambda d: score(d) + Z_95, value, edge) if value < edge and score(edge) < -Z_95 else 1.0
    return float(low), float(high)


def auroc(value: float, trues: float, falses: float) -> tuple[float, float]:
    """Return a 95% score interval of an AUROC, which has a width where the order is perfect.

    It is Newcombe's method 5 (2006, "Confidence intervals for an effect size measure based on the Mann-Whitney statistic,
    part 2", Statistics in Medicine 25).

    Args:
        value: the AUROC.
        trues: independent samples of the one class.
        falses: of the other.
    """

    def away(area: float) -> float:
        """Return by how many standard errors the value is above an area, or below."""
        more = (trues + falses) / 2 - 1
        spread = 1 + more * (1 - area) / (2 - area) + more * area / (1 + area)
        return (value - area) / math.sqrt(area * (1 - area) * max(spread, 1.0) / (trues * falses))

    edge = 1e-9
    low = brentq(lambda area: away(area) - Z_95, edge, value - edge) if value > 2 * edge and away(edge) > Z_95 else 0.0
    high = (
        brentq(lambda area: away(area) + Z_95, value + edge, 1 - edge)
        if value < 1 - 2 * edge and away(1 - edge) < -Z_95
        else 1.0
    )
    return float(low), float(high)
