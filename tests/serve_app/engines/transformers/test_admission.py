"""Admission: which jobs may run together, and which are prefilled together."""

from collections import deque

import pytest

from roentgen.contract import Positions
from serve_app.capture.rows import CapturePlan
from serve_app.capture.structure import Tap
from serve_app.engines.memory_budget import free_host_memory
from serve_app.engines.protocol import GenerationJob, RequestTooLargeError, Sampling
from serve_app.engines.transformers.admission import Budget, cache_bytes_per_token, next_jobs, total_tokens
from tests.serve_app import tiny

ROOMY = Budget(cache_tokens=10_000, row_bytes=10_000, bytes_per_row=10)


def job(n_prompt: int, max_tokens: int = 10, plan: CapturePlan | None = None) -> GenerationJob:
    return GenerationJob([1] * n_prompt, Sampling(max_tokens), lambda event: None, plan)


def keeping(positions: str, n_taps: int = 2) -> CapturePlan:
    return CapturePlan({str(i): Tap("m", "output") for i in range(n_taps)}, Positions.parse(positions), "model")


def lengths(jobs: list[GenerationJob]) -> list[int]:
    return [len(one.prompt_ids) for one in jobs]


def test_a_token_of_the_cache_is_measured() -> None:
    # 3 layers, keys and values, 2 KV heads of 8 float32 each.
    assert cache_bytes_per_token(tiny.loaded("llama")) == 3 * 2 * 2 * 8 * 4


def test_the_budget_comes_from_the_memory_that_is_free() -> None:
    model = tiny.loaded("llama")
    budget = Budget.measure(model)
    assert 0.2 * free_host_memory() < budget.cache_tokens * cache_bytes_per_token(model) < 0.5 * free_host_memory()
    assert Budget.measure(model, max_cache_tokens=100).cache_tokens == 100


def test_what_can_never_fit_is_refused_with_both_numbers() -> None:
    Budget(60, 0, 1).check(job(50, 10))
    with pytest.raises(RequestTooLargeError, match="room for 60 tokens; the KV cache holds 59"):
        Budget(59, 0, 1).check(job(50, 10))
    with pytest.raises(RequestTooLargeError, match="fewer layers"):
        Budget(60, 1000, 10).check(job(50, 10, keeping("all")))
    Budget(60, 1000, 10).check(job(50, 10, keeping("last_prompt")))
    Budget(60, 1000, 10).check(job(50, 10, keeping("mean_prompt")))


def test_the_widest_row_sets_the_price_of_all() -> None:
    budget = Budget(100, 0, 1)
    assert budget.admits([job(10)], job(40))
    assert not budget.admits([job(10)], job(41))
    assert not budget.admits([job(40)], job(41))


def test_captured_rows_have_a_budget_too() -> None:
    budget = Budget(10_000, 800, 10)
    assert budget.admits([job(10, 10, keeping("all"))], job(10, 10, keeping("all")))
    assert not budget.admits([job(10, 10, keeping("all"))], job(11, 10, keeping("all")))


def test_the_first_in_the_queue_goes_first_with_those_nearest_to_it() -> None:
    waiting = deque(job(n) for n in (10, 90, 11, 50, 9))
    assert lengths(next_jobs(waiting, [], ROOMY, max_batch=8, max_prefill_tokens=40)) == [10, 11, 9]
    assert lengths(list(waiting)) == [90, 50]
    assert lengths(next_jobs(waiting, [], ROOMY, max_batch=8, max_prefill_tokens=40)) == [90]


def test_no_more_than_the_batch_and_the_budget_allow() -> None:
    waiting = deque(job(10) for _ in range(5))
    assert next_jobs(waiting, [job(1)] * 2, ROOMY, max_batch=2, max_prefill_tokens=99) == []
    assert len(next_jobs(waiting, [job(1)] * 2, ROOMY, max_batch=4, max_prefill_tokens=99)) == 2
    assert len(next_jobs(waiting, [], Budget(40, 0, 1), max_batch=9, max_prefill_tokens=99)) == 2
    assert len(waiting) == 1
    assert total_tokens(waiting[0]) == 20
    assert next_jobs(deque([job(100)]), [job(10)], Budget(120, 0, 1), max_batch=9, max_prefill_tokens=99) == []
