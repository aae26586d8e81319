"""The adaptive limit against simulated servers with a simulated clock."""

import random

import pytest

from eval_jobs.concurrency import BACK_OFF, AdaptiveLimit, FixedLimit


def simulate(limit: AdaptiveLimit, capacity: int, requests: int, seed: int = 0) -> list[int]:
    """Finish requests on a server that gets faster up to `capacity` in flight; return the limit after each."""
    rng, now, seen = random.Random(seed), 0.0, []
    for _ in range(requests):
        now += rng.uniform(0.7, 1.3) / min(limit.value, capacity)
        limit.finished(100, now)
        seen.append(limit.value)
    return seen


@pytest.mark.parametrize("capacity", [4, 16, 64])
def test_it_finds_what_a_server_can_take(capacity: int) -> None:
    for seed in range(5):
        later = simulate(AdaptiveLimit(), capacity, 5_000, seed)[2_000:]
        assert capacity * 0.75 <= sum(later) / len(later) <= capacity * 2.5


def test_it_stops_at_the_most() -> None:
    assert max(simulate(AdaptiveLimit(most=20), 1_000, 2_000)) == 20


def test_a_busy_server_lowers_it_once_for_all_in_flight() -> None:
    limit = AdaptiveLimit()
    simulate(limit, 64, 2_000)
    before = limit.value
    for _ in range(before):
        limit.refused()
    assert limit.value == int(before * BACK_OFF)


def test_it_rises_again_when_the_server_grows() -> None:
    limit = AdaptiveLimit()
    simulate(limit, 8, 2_000)
    assert limit.value <= 20
    assert max(simulate(limit, 64, 20_000)) >= 48


def test_a_fixed_limit_is_fixed() -> None:
    limit = FixedLimit(7)
    limit.finished(10, 1.0)
    limit.refused()
    assert limit.value == 7
