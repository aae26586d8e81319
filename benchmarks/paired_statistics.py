"""Ratios of interleaved pairs, with distribution-free intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from statistics import median

import numpy as np


@dataclass(frozen=True)
class Interval:
    """An estimate and what it may be."""

    estimate: float
    """The median."""
    low: float
    """Lower end."""
    high: float
    """Upper end."""
    coverage: float
    """Probability that such an interval contains the true median."""

    def __str__(self) -> str:
        return f"{self.estimate:.3f} ({self.low:.3f} to {self.high:.3f})"


def median_interval(values: Sequence[float], at_least: float = 0.9) -> Interval:
    """Return the median and an exact interval for it, from order statistics.

    The k-th smallest and k-th largest of n values enclose the median unless fewer than k values fall on one side of it, which
    is a binomial probability. The narrowest such pair that reaches `at_least` is taken; with too few values, the widest.

    Raises:
        ValueError: if there are no values.
    """
    if not values:
        raise ValueError("there is no median of no values")
    ordered, n = sorted(values), len(values)

    def coverage(k: int) -> float:
        return 1 - 2 * sum(comb(n, i) for i in range(k)) / float(2**n)

    k = max((k for k in range(1, (n + 1) // 2 + 1) if coverage(k) >= at_least), default=1)
    return Interval(float(median(ordered)), ordered[k - 1], ordered[n - k], max(0.0, coverage(k)))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Return the median ratio of runs that were made in pairs."""
    return median_interval([a / b for a, b in zip(ours, theirs, strict=True)])


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile, interpolated."""
    return float(np.percentile(values, percent))


def slope_interval(x: Sequence[float], y: Sequence[float]) -> Interval:
    """Return the Theil-Sen slope of y over x, with a 95% interval; one jump in the curve does not move it much.

    Raises:
        ValueError: if there are fewer than three points.
    """
    from scipy.stats import theilslopes

    if len(x) < 3:
        raise ValueError(f"{len(x)} points have no slope with an interval")
    found = theilslopes(np.asarray(y, dtype=float), np.asarray(x, dtype=float), alpha=0.95)
    return Interval(float(found.slope), float(found.low_slope), float(found.high_slope), 0.95)
