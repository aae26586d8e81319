"""Statistics of verdicts: accuracies with intervals, pass@k and maj@k, and differences between paired conditions.

Several samples of one problem are not independent evidence, so everything is clustered by problem, or by what problems
share, such as a template (Miller 2024, "Adding Error Bars to Evals", arXiv 2411.00640). Standard errors follow that paper.

Intervals are not the estimate ± 1.96 standard errors (Wald's): with few problems, or if all agree, those are far too narrow
and may have no width. Each interval uses a method for independent trials, given the number of trials with the observed
standard error (the effective sample size, with a correction for few clusters, as in Korn and Graubard 1998, "Confidence
intervals for proportions with small expected number of positive counts estimated from survey data", Survey Methodology 24):

- an accuracy: Wilson's score interval;
- a mean over problems of shares (pass@k, maj@k): Clopper and Pearson's exact interval;
- a difference of the same problems under two conditions: Tango's score interval for paired proportions (Tango 1998,
  "Equivalence test and confidence interval for the difference in proportions for the paired-sample design", Statistics in
  Medicine 17; Newcombe 1998, "Improved confidence intervals for the difference between binomial proportions based on paired
  data", in the same volume, shows how the Wald interval fails).

With n clusters there are at least n trials, because a cluster's mean varies at most as much as a single trial: a variance
that few clusters underestimate by chance does not produce a narrow interval.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.stats import binomtest
from scipy.stats import t as student

from roentgen.intervals import Z_95, exact, paired, wilson

FEW = 30
"""Number of problems below which a variance of shares is not used: each problem then counts as one trial."""

NO_CHANGE = 1e-9
"""Threshold below which a cluster's total change counts as no change."""


@dataclass(frozen=True)
class Accuracy:
    """A share of correct samples."""

    n: int
    """Samples."""
    correct: int
    """Number of correct samples."""
    value: float | None
    """The share; None without samples."""
    standard_error: float | None
    """Standard error clustered by problem; with one sample per problem, sample standard deviation / √n, as
    lm-evaluation-harness reports it. None for fewer than two problems."""
    low: float | None
    """Lower end of the 95% interval (Wilson's, which stays inside [0, 1] and is valid for few samples, with the effective
    sample size)."""
    high: float | None
    """Its upper end."""


@dataclass(frozen=True)
class MeanEstimate:
    """A mean over problems, each a share, with its 95% interval."""

    value: float
    standard_error: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference:
    """The difference of two conditions on the same problems."""

    problems: int
    """Number of problems that both have."""
    value: float | None
    """Difference of the accuracies on them, each problem counted once."""
    standard_error: float | None
    """Standard error of the paired difference over problems; None for fewer than two."""
    low: float | None
    """Lower end of its 95% interval."""
    high: float | None
    """Upper end."""
    gained: int
    """Number of problems correct here and incorrect there; with several samples per problem, better here."""
    lost: int
    """The reverse."""
    p_value: float | None
    """P-value of McNemar's exact test on these two numbers; with several samples per problem, of the sign test on problems;
    with clusters of several problems, on clusters."""


def accuracy(verdicts: Sequence[bool], problems: Sequence[Hashable] | None = None) -> Accuracy:
    """Estimate a model's accuracy.

    Args:
        verdicts: one per sample.
        problems: the problem or cluster of each sample; None if each has its own.
    """
    n, correct = len(verdicts), sum(map(bool, verdicts))
    if n == 0:
        return Accuracy(0, 0, None, None, None, None)
    p = correct / n
    own = _clustered(np.array(verdicts, dtype=float), range(n) if problems is None else problems, p * (1 - p))
    return Accuracy(n, correct, p, own.standard_error, *wilson(p, own.trials(n)))


@dataclass(frozen=True)
class _Clustered:
    """The variation of a mean over clusters."""

    n: int
    """Values."""
    clusters: float
    """Effective number of clusters: the number of equal clusters with the same weight (Kish's n², over Σ sizes²)."""
    count: int
    """Clusters."""
    standard_error: float | None
    """Standard error of the mean; None for fewer than two clusters."""
    ratio: float | None
    """Variance of the mean relative to that of independent trials; None if one of the two is 0."""

    def trials(self, most: int) -> float:
        """Return the effective number of independent trials, at most `most`."""
        if self.ratio is None:
            return min(float(most), self.clusters)
        # Student's quantile, relative to the normal one, accounts for the uncertainty of a variance from few clusters.
        found = self.n / self.ratio * (Z_95 / float(student.ppf(0.975, self.count - 1))) ** 2
        return min(float(most), max(self.clusters, found))


def _clustered(values: Float[np.ndarray, "n"], clusters: Sequence[Hashable], variance: float) -> _Clustered:
    """Compute the variation of the mean of values over clusters.

    Args:
        values: the values.
        clusters: the cluster of each value.
        variance: variance of single independent trials with the same mean.
    """
    n, centred = len(values), values - values.mean()
    sums: defaultdict[Hashable, float] = defaultdict(float)
    sizes: Counter[Hashable] = Counter()
    for value, cluster in zip(centred.tolist(), clusters, strict=True):
        sums[cluster] += value
        sizes[cluster] += 1
    count = len(sums)
    equal = n**2 / sum(size**2 for size in sizes.values())
    if count < 2:
        return _Clustered(n, equal, count, None, None)
    error = math.sqrt(sum(total**2 for total in sums.values()) * count / (count - 1)) / n
    independent = math.sqrt(variance / (n - 1))
    return _Clustered(n, equal, count, error, (error / independent) ** 2 if error and independent else None)


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
    """Return the most frequent answer, with ties in favor of the first given; None if there is no answer (maj@k, or
    self-consistency: Wang et al. 2022, arXiv 2203.11171)."""
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes, key=votes.__getitem__) if votes else None


def mean(
    values: Sequence[float], clusters: Sequence[Hashable] | None = None, trials: int | None = None
) -> MeanEstimate | None:
    """Estimate a mean over problems; None without problems.

    Args:
        values: the share of each problem.
        clusters: which problems count as one; None if each is alone.
        trials: number of samples behind the values, an upper bound of the effective number of trials; None if each value is
            one trial.
    """
    if not values:
        return None
    n, value = len(values), float(np.mean(values))
    own = _clustered(np.array(values, dtype=float), range(n) if clusters is None else clusters, value * (1 - value))
    return MeanEstimate(
        value, own.standard_error, *exact(value, own.trials(n if trials is None or n < FEW else trials))
    )


def difference(
    here: Mapping[Hashable, Sequence[bool]],
    there: Mapping[Hashable, Sequence[bool]],
    clusters: Mapping[Hashable, Hashable] | None = None,
) -> Difference:
    """Compare two conditions on the problems that both have.

    Args:
        here: verdicts by problem, one per sample.
        there: likewise.
        clusters: the cluster of each problem; None if each is its own.
    """
    common = [problem for problem in here if problem in there]
    shares: Float[np.ndarray, "problems"] = np.array(
        [np.mean(here[problem]) - np.mean(there[problem]) for problem in common], dtype=float
    )
    n = len(common)
    if n == 0:
        return Difference(0, None, None, None, None, 0, 0, None)
    gained, lost = int((shares > 0).sum()), int((shares < 0).sum())
    value, more, less = float(shares.mean()), float(shares.clip(min=0).mean()), float((-shares).clip(min=0).mean())
    belongs = common if clusters is None else [clusters[problem] for problem in common]
    own = _clustered(shares, belongs, max(0.0, more + less - value**2))
    low, high = paired(more, less, own.trials(sum(min(len(here[p]), len(there[p])) for p in common)))
    return Difference(n, value, own.standard_error, low, high, gained, lost, _sign_test(shares, belongs))


def _sign_test(shares: Float[np.ndarray, "problems"], clusters: Sequence[Hashable]) -> float:
    """Return the p-value of the sign test; it is McNemar's exact test if a cluster is a problem with one sample."""
    sums: defaultdict[Hashable, float] = defaultdict(float)
    for share, cluster in zip(shares.tolist(), clusters, strict=True):
        sums[cluster] += share
    up, down = sum(total > NO_CHANGE for total in sums.values()), sum(total < -NO_CHANGE for total in sums.values())
    return float(binomtest(up, up + down).pvalue) if up + down else 1.0
