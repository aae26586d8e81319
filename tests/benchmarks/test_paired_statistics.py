from itertools import product

import pytest

from benchmarks.paired_statistics import median_interval, percentile, ratios, slope_interval


def test_five_pairs_give_their_range() -> None:
    interval = median_interval([1.2, 0.9, 1.0, 1.1, 0.8])
    assert (interval.estimate, interval.low, interval.high) == (1.0, 0.8, 1.2)
    assert interval.coverage == 1 - 2 / 2**5
    assert str(interval) == "1.000 (0.800 to 1.200)"


def test_more_pairs_give_less_than_their_range() -> None:
    interval = median_interval(list(range(11)))
    assert (interval.low, interval.high) == (2, 8)
    assert interval.coverage >= 0.9


def test_the_coverage_is_that_of_all_ways_to_fall_around_the_median() -> None:
    n = 7
    interval = median_interval(list(range(n)))
    below = interval.low
    inside = [sides for sides in product((0, 1), repeat=n) if below < sum(sides) < n - below]
    assert interval.coverage == pytest.approx(len(inside) / 2**n)


def test_one_pair_proves_nothing() -> None:
    assert median_interval([0.5]).coverage == 0
    with pytest.raises(ValueError, match="no values"):
        median_interval([])


def test_ratios_are_of_pairs() -> None:
    assert ratios([10, 30, 20], [20, 20, 20]).estimate == 1.0
    with pytest.raises(ValueError, match="zip"):
        ratios([1, 2], [1])


def test_percentile_interpolates() -> None:
    assert percentile([1, 2, 3, 4, 5], 50) == 3
    assert percentile([0, 10], 95) == pytest.approx(9.5)


def test_a_jump_does_not_make_a_slope() -> None:
    x = list(range(20))
    flat = slope_interval(x, [5.0] * 19 + [500.0])
    assert (flat.estimate, flat.low, flat.high) == (0, 0, 0)
    rising = slope_interval(x, [2.0 * i + (-1) ** i * 0.1 for i in x])
    assert rising.low <= 2.0 <= rising.high
    assert rising.low > 0
    with pytest.raises(ValueError, match="2 points"):
        slope_interval([1, 2], [1, 2])
