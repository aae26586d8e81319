"""Statistics against hand-computed numbers and simulations."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import xlogy
from scipy.stats import binomtest

from roentgen.intervals import paired
from roentgen.statistics import accuracy, difference, majority, mean, pass_at_k


def test_accuracy() -> None:
    found = accuracy([True] * 30 + [False] * 70)
    assert (found.n, found.correct, found.value) == (100, 30, 0.3)
    assert found.standard_error == pytest.approx(0.046057, abs=1e-6)  # sqrt(0.3 * 0.7 / 99)
    assert (found.low, found.high) == pytest.approx((0.218949, 0.395849), abs=1e-5)  # Wilson


def test_accuracy_at_the_edges() -> None:
    none, one = accuracy([]), accuracy([True])
    assert none.value is none.standard_error is none.low is None
    assert one.standard_error is None
    assert one.low == pytest.approx(0.206549, abs=1e-5)
    assert one.high == 1.0
    assert accuracy([False] * 5).low == 0.0


def test_one_sample_a_problem_is_the_plain_case() -> None:
    verdicts = [True] * 30 + [False] * 70
    assert accuracy(verdicts, range(100)) == accuracy(verdicts)


def test_copies_of_a_sample_add_nothing() -> None:
    """Ten problems, each posed five times with the same outcome, are ten observations."""
    once = [True] * 3 + [False] * 7
    five = accuracy(
        [verdict for verdict in once for _ in range(5)], [problem for problem in range(10) for _ in range(5)]
    )
    alone = accuracy(once)
    assert five.n == 50
    assert five.standard_error == pytest.approx(alone.standard_error)
    assert (five.low, five.high) == pytest.approx((alone.low, alone.high), abs=0.015)
    always = accuracy([True] * 50, [problem for problem in range(10) for _ in range(5)])
    assert always.low == pytest.approx(accuracy([True] * 10).low)


def test_the_clustered_error_is_that_of_the_mean_over_repetitions() -> None:
    rng = np.random.default_rng(0)

    def run() -> tuple[float, float]:
        ability = rng.beta(1, 1, size=60)
        verdicts = rng.random((60, 4)) < ability[:, None]
        found = accuracy(verdicts.ravel().tolist(), np.repeat(np.arange(60), 4).tolist())
        return float(found.value or 0), float(found.standard_error or 0)

    runs = [run() for _ in range(400)]
    spread = np.std([value for value, _ in runs])
    assert np.mean([error for _, error in runs]) == pytest.approx(spread, rel=0.1)


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_counts_every_draw(case: tuple[int, int, int]) -> None:
    n, correct, k = case
    draws = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
    assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_more_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="k = 4 is not between 1 and the 3 samples"):
        pass_at_k(3, 1, 4)


def test_the_majority_is_the_first_of_those_that_tie() -> None:
    assert majority(["4", "5", None, "5"]) == "5"
    assert majority(["4", "5", None]) == "4"
    assert majority([None]) is None


def test_a_mean_over_problems() -> None:
    found = mean([0.0, 0.5, 1.0, 1.0])
    assert found is not None
    assert (found.value, found.standard_error) == pytest.approx((0.625, 0.239357), abs=1e-6)
    assert (found.low, found.high) == pytest.approx((0.122754, 0.971529), abs=1e-6)  # beta quantiles: 2.5 of 4 trials
    assert mean([]) is None


def test_a_difference_is_paired() -> None:
    here = {"a": [True], "b": [True], "c": [False], "d": [True], "only here": [True]}
    there = {"a": [False], "b": [False], "c": [True], "d": [True], "only there": [False]}
    found = difference(here, there)
    assert (found.problems, found.gained, found.lost) == (4, 2, 1)
    assert found.value == 0.25
    assert found.standard_error == pytest.approx(0.478714, abs=1e-6)  # sd of (1, 1, -1, 0) is 0.957427, over 2
    assert found.p_value == 1.0  # 2 against 1


def test_mcnemar_is_exact() -> None:
    here = {n: [True] for n in range(10)}
    there = {n: [n == 0] for n in range(10)}
    assert difference(here, there).p_value == pytest.approx(2 / 2**9)  # nine against none
    assert difference(here, here).p_value == 1.0
    assert difference(here, {}).value is None


def test_no_interval_collapses() -> None:
    """Where all problems do alike, an interval is that of Clopper and Pearson, or Tango's closed form z²/(n + z²)."""
    for n in (1, 5, 20):
        always, never = mean([1.0] * n), mean([0.0] * n)
        assert always is not None
        assert never is not None
        expected = binomtest(n, n).proportion_ci(method="exact")
        assert (always.low, always.high) == pytest.approx((expected.low, 1.0))
        assert (never.low, never.high) == pytest.approx((0.0, 1 - expected.low))
        same = difference(alike := {i: [i % 2 == 0] for i in range(n)}, alike)
        half = 1.959964**2 / (n + 1.959964**2)
        assert (same.low, same.high) == pytest.approx((-half, half), abs=1e-6)
    assert difference({1: [True]}, {1: [False]}).high == 1.0


def test_a_paired_interval_is_where_the_score_test_says_no_more() -> None:
    """Tango's statistic, with the nuisance share found by maximising the likelihood, is the quantile at both ends."""

    def statistic(b: int, c: int, n: int, d: float) -> float:
        def minus_likelihood(q: float) -> float:  # q: the share right in the second only; q + d in the first only
            return -(xlogy(b, q + d) + xlogy(c, q) + xlogy(n - b - c, 1 - 2 * q - d))

        low, high = max(0.0, -d), (1 - d) / 2
        q = minimize_scalar(minus_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
        return float((b - c - n * d) / np.sqrt(n * (2 * q + d - d**2)))

    for b, c, n in ((12, 3, 40), (3, 7, 40), (2, 1, 5), (9, 1, 11)):
        low, high = paired(b / n, c / n, n)
        assert statistic(b, c, n, low) == pytest.approx(1.959964, abs=1e-3)
        assert statistic(b, c, n, high) == pytest.approx(-1.959964, abs=1e-3)


@pytest.mark.parametrize(("n", "most"), [(5, 5), (20, 20), (100, 12)])
def test_paired_intervals_cover_the_difference(n: int, most: int) -> None:
    """Every outcome of n pairs, weighted with its probability; of 100, those that rare changes give."""
    shares = (0.005, 0.02, 0.05, 0.1, 0.3) if n < 100 else (0.002, 0.005, 0.01, 0.02)
    ends = {(b, c): paired(b / n, c / n, n) for b in range(most + 1) for c in range(min(most, n - b) + 1)}
    for here, there in itertools.product(shares, shares):
        covered = left = 0.0
        for (b, c), (low, high) in ends.items():
            ways = math.comb(n, b) * math.comb(n - b, c)
            chance = ways * here**b * there**c * (1 - here - there) ** (n - b - c)
            covered += chance * (low <= here - there <= high)
            left += chance
        assert covered + (1 - left) >= 0.93, (n, here, there)


@pytest.mark.parametrize("n", [5, 20, 100])
def test_pass_and_majority_intervals_cover_what_they_estimate(n: int) -> None:
    """Problems of unlike difficulty, sampled anew 120 times; most are always solved, or never, or anything between."""
    rng = np.random.default_rng(n)
    for ability in ((5, 0.2), (0.2, 5), (1, 1), (50, 0.5)):
        p = rng.beta(*ability, size=100_000)
        for k in (1, 4):
            covered, truth = 0, 1 - np.mean((1 - p) ** k)
            for _ in range(120):
                right = rng.binomial(8, rng.beta(*ability, size=n))
                found = mean([pass_at_k(8, int(one), k) for one in right], trials=n * 8 // k)
                assert found is not None
                assert found.low is not None
                assert found.high is not None
                covered += found.low <= truth <= found.high
            assert covered >= 0.92 * 120, (ability, k)


def test_what_counts_as_one_problem_is_one() -> None:
    """Copies of a problem under other ids add nothing to a difference, a mean or a p-value."""
    here, there = {i: [i < 8] for i in range(10)}, {i: [False] for i in range(10)}
    once = difference(here, there)
    copies = [(i, copy) for i in range(10) for copy in range(4)]
    clusters = {copy: copy[0] for copy in copies}
    four = difference({c: here[c[0]] for c in copies}, {c: there[c[0]] for c in copies}, clusters)
    assert (four.low, four.high, four.p_value) == pytest.approx((once.low, once.high, once.p_value))
    assert four.standard_error == pytest.approx(once.standard_error)
    apart = difference({c: here[c[0]] for c in copies}, {c: there[c[0]] for c in copies})
    assert (apart.high or 0) - (apart.low or 0) < 0.6 * ((once.high or 0) - (once.low or 0))
    alone = mean([0.0] * 5 + [1.0] * 5)
    known = mean(([0.0] * 5 + [1.0] * 5) * 4, [*range(10)] * 4)
    assert known is not None
    assert alone is not None
    assert (known.low, known.high) == pytest.approx((alone.low, alone.high))
