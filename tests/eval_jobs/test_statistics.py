"""Statistics, against numbers worked out by hand, and against simulation."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_jobs.statistics import accuracy, difference, majority, mean, pass_at_k


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
    assert (found.low, found.high) == (pytest.approx(0.155870, abs=1e-6), 1.0)
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
