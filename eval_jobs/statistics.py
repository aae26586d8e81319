"""What verdicts come to: accuracies with intervals, pass@k and maj@k, and differences between paired conditions.

Several samples of one problem are no independent evidence, so everything is clustered by problem (Miller 2024, "Adding Error
Bars to Evals", arXiv 2411.00640).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import binomtest

Z_95 = 1.959963984540054
"""Standard normal quantile of a two-sided 95% interval."""


@dataclass(frozen=True)
class Accuracy:
    """A share of correct samples.

    Attributes:
        n: samples.
        correct: how many are correct.
        value: the share, None of no samples.
        standard_error: clustered by problem; with one sample a problem, sample standard deviation / √n, as
            lm-evaluation-harness reports it. None for fewer than two problems.
        low: lower end of the 95% interval (Wilson's, which stays inside [0, 1] and holds for few samples; of the number of
            independent samples that would have this standard error).
        high: its upper end.
    """

    n: int
    correct: int
    value: float | None
    standard_error: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its 95% interval (normal, cut to [0, 1])."""

    value: float
    standard_error: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference:
    """How a condition differs from another on the same problems.

    Attributes:
        problems: that both have.
        value: difference of the accuracies on them, each problem counted once.
        standard_error: of the paired difference, over problems; None for fewer than two.
        low: lower end of its 95% interval.
        high: upper end.
        gained: problems right here and wrong there. With several samples a problem: better here.
        lost: the reverse.
        p_value: of McNemar's exact test on these two; with several samples a problem, it is the sign test on problems.
    """

    problems: int
    value: float | None
    standard_error: float | None
    low: float | None
    high: float | None
    gained: int
    lost: int
    p_value: float | None


def accuracy(verdicts: Sequence[bool], problems: Sequence[Hashable] | None = None) -> Accuracy:
    """Estimate a model's accuracy.

    Args:
        verdicts: one per sample.
        problems: whose samples they are; None if each has its own.
    """
    n, correct = len(verdicts), sum(map(bool, verdicts))
    if n == 0:
        return Accuracy(0, 0, None, None, None, None)
    p = correct / n
    sums: defaultdict[Hashable, float] = defaultdict(float)
    for verdict, problem in zip(verdicts, range(n) if problems is None else problems, strict=True):
        sums[problem] += bool(verdict) - p
    clusters = len(sums)
    error = (
        math.sqrt(sum(total**2 for total in sums.values()) * clusters / (clusters - 1)) / n if clusters > 1 else None
    )
    independent = math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else 0.0
    # If all verdicts are equal, nothing is known of how they vary within a problem: each problem counts once.
    effective = n * (independent / error) ** 2 if error and independent else float(clusters)
    return Accuracy(n, correct, p, error, *wilson(p, min(float(n), effective)))


def wilson(p: float, n: float) -> tuple[float, float]:
    """Return Wilson's 95% interval of a share `p` of `n` independent trials."""
    centre = (p + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
    half = Z_95 * math.sqrt(p * (1 - p) / n + Z_95**2 / (4 * n**2)) / (1 + Z_95**2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return the chance that one of `k` samples, drawn from the `n` of a problem, is correct (Chen et al. 2021, arXiv
    2107.03374).

    Raises:
        ValueError: if k is not between 1 and n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k = {k} is not between 1 and the {n} samples")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority(answers: Iterable[str | None]) -> str | None:
    """Return the answer most samples give, the first given of those that tie; None if none gives one (maj@k, or
    self-consistency: Wang et al. 2022, arXiv 2203.11171)."""
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes, key=votes.__getitem__) if votes else None


def mean(values: Sequence[float]) -> Estimate | None:
    """Estimate a mean over problems; None of no problems."""
    if not values:
        return None
    value = float(np.mean(values))
    if len(values) == 1:
        return Estimate(value, None, None, None)
    error = float(np.std(values, ddof=1) / math.sqrt(len(values)))
    return Estimate(value, error, max(0.0, value - Z_95 * error), min(1.0, value + Z_95 * error))


def difference(here: dict[Hashable, list[bool]], there: dict[Hashable, list[bool]]) -> Difference:
    """Compare two conditions on the problems that both have; each is a problem's verdicts, one per sample."""
    common = [problem for problem in here if problem in there]
    shares: Float[np.ndarray, "problems"] = np.array(
        [np.mean(here[problem]) - np.mean(there[problem]) for problem in common], dtype=float
    )
    better: Bool[np.ndarray, "problems"] = shares > 0
    worse: Bool[np.ndarray, "problems"] = shares < 0
    gained, lost = int(better.sum()), int(worse.sum())
    n = len(common)
    if n == 0:
        return Difference(0, None, None, None, None, 0, 0, None)
    value = float(shares.mean())
    p_value = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    if n == 1:
        return Difference(n, value, None, None, None, gained, lost, p_value)
    error = float(shares.std(ddof=1) / math.sqrt(n))
    return Difference(n, value, error, value - Z_95 * error, value + Z_95 * error, gained, lost, p_value)
