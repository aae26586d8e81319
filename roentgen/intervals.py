"""95% intervals of shares, paired differences and AUROCs, from counts of independent trials.

Intervals of the form "estimate ± 1.96 standard errors" have no width if all trials agree, and neither have bootstrap
percentiles. These intervals do, and keep their coverage with few trials. The number of trials need not be whole: for
clustered samples it is the effective sample size.
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
        more: share of pairs that are positive only in the first.
        less: share of pairs that are positive only in the second.
        n: number of pairs, not necessarily whole.
    """

    value, edge = more - less, 1 - 1e-12

    def score(d: float) -> float:
        """Return the score statistic of a difference `d`; it decreases in `d`."""
        b, away = (2 - more + less) * d - more - less, value - d
        only_second = (math.sqrt(max(0.0, b * b + 8 * less * d * (1 - d))) - b) / 4  # the likeliest share, given d
        variance = max(0.0, 2 * only_second + d * (1 - d)) / n
        return away / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, away) if away else 0.0

    low = brentq(lambda d: score(d) - Z_95, -edge, value) if value > -edge and score(-edge) > Z_95 else -1.0
    high = brentq(lambda d: score(d) + Z_95, value, edge) if value < edge and score(edge) < -Z_95 else 1.0
    return float(low), float(high)


def auroc(value: float, trues: float, falses: float) -> tuple[float, float]:
    """Return a 95% score interval of an AUROC, with positive width even for a perfect order.

    It is Newcombe's method 5 (2006, "Confidence intervals for an effect size measure based on the Mann-Whitney statistic,
    part 2", Statistics in Medicine 25).

    Args:
        value: the AUROC.
        trues: number of independent positive samples.
        falses: number of independent negative samples.
    """

    def away(area: float) -> float:
        """Return the signed distance of the value from an area, in standard errors."""
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
