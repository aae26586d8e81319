"""Rows of a running batch: gathered once per forward, joined per request, never keeping the batch alive."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roentgen.contract import Positions, StoredDtype
from serve_app.capture.batch_layout import PaddedBatch
from serve_app.capture.row_memory import RowMemory
from serve_app.capture.rows import JOIN_EVERY, CapturePlan, RequestRows, StepRows, UncapturableError
from serve_app.capture.structure import Tap

MEMORY = RowMemory()


def plan(positions: str = "all", dtype: StoredDtype = "model", keys: str = "x", **limits: int | None) -> CapturePlan:
    taps = {key: Tap(key, "output") for key in keys}
    return CapturePlan(taps, Positions.parse(positions), dtype, **limits)


def forward(
    requests: list[RequestRows | None], lengths: list[int], width: int, start: int = 0, **values: torch.Tensor
) -> StepRows:
    step = StepRows(requests, PaddedBatch([range(start, start + length) for length in lengths], width), MEMORY)
    for key, value in values.items():
        if key in step.taps:
            step(key, value)
    step.deliver()
    return step


def test_padding_and_other_requests_rows_are_left_out() -> None:
    first, third = RequestRows(plan(), 2, MEMORY), RequestRows(plan(), 1, MEMORY)
    forward([first, None, third], [2, 3, 1], 3, x=torch.arange(9.0).reshape(3, 3, 1))
    assert first.cut().tensors["x"].flatten().tolist() == [1, 2]
    assert third.cut().tensors["x"].flatten().tolist() == [8]


@pytest.mark.parametrize("lengths", [[3, 3], [2, 3]])
@pytest.mark.parametrize("policy", ["all", "mean_prompt"])
def test_a_value_in_two_parts_is_their_sum(lengths: list[int], policy: str) -> None:
    """Where the wanted rows lie side by side, and where padding is between them."""
    requests = [RequestRows(plan(policy), length, MEMORY) for length in lengths]
    value, plus = torch.randn(2, 3, 4).bfloat16(), torch.randn(2, 3, 4)
    step = StepRows(list(requests), PaddedBatch([range(length) for length in lengths], 3), MEMORY)
    step("x", value, plus)
    step.deliver()
    for request, length, rows in zip(requests, lengths, value + plus, strict=True):
        kept = request.cut().tensors["x"]
        expected = rows[-length:].mean(0, keepdim=True) if policy == "mean_prompt" else rows[-length:]
        assert kept.dtype == torch.float32
        torch.testing.assert_close(kept, expected)


def test_a_module_that_sees_batch_and_tokens_flattened() -> None:
    request = RequestRows(plan(), 2, MEMORY)
    forward([request, None], [2, 2], 2, x=torch.arange(8.0).reshape(4, 2))
    assert request.cut().tensors["x"].tolist() == [[0, 1], [2, 3]]


def test_per_head_values_keep_their_shape() -> None:
    request = RequestRows(plan("mean_prompt", keys="xh"), 2, MEMORY)
    heads = torch.randn(1, 2, 4, 8)
    forward([request], [2], 2, x=torch.ones(1, 2, 5), h=heads)
    tensors = request.cut().tensors
    assert tensors["x"].shape == (1, 5)
    torch.testing.assert_close(tensors["h"], heads.mean(1))


@pytest.mark.parametrize("value", [None, torch.ones(1, 5, 4), torch.ones(())])
def test_a_value_without_a_row_per_token_is_an_error_for_who_asked(value: torch.Tensor | None) -> None:
    """A module that did not run, or one whose value is not per token, such as a table of positions."""
    request, other = RequestRows(plan(keys="ox"), 5, MEMORY), RequestRows(plan(keys="o"), 5, MEMORY)
    values = {"o": torch.ones(2, 5, 3)} | ({} if value is None else {"x": value})
    forward([request, other], [5, 5], 5, **values)
    with pytest.raises(UncapturableError, match="x has no row per token"):
        request.cut()
    assert other.cut().tensors["o"].shape == (5, 3)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_dtype_asked_for(dtype: StoredDtype) -> None:
    request = RequestRows(plan(dtype=dtype), 1, MEMORY)
    forward([request], [1], 1, x=torch.ones(1, 1, 4))
    assert request.cut().tensors["x"].dtype == getattr(torch, dtype)


def test_pooling_adds_up_in_float32() -> None:
    """4,096 ones and a bfloat16 sum that stops at 256 would give a mean of 0.06."""
    request = RequestRows(plan("mean_prompt"), 4096, MEMORY)
    forward([request], [4096], 4096, x=torch.ones(1, 4096, 1, dtype=torch.bfloat16))
    rows = request.cut().tensors["x"]
    assert rows.dtype == torch.bfloat16
    assert rows.item() == 1


POLICIES = ["all", "prompt", "generated", "last_prompt", "last", "stride:3", "mean_prompt", "mean_generated"]


@settings(max_examples=200, deadline=None)
@given(
    policies=st.lists(st.sampled_from(POLICIES), min_size=1, max_size=4),
    n_prompt=st.integers(1, 12),
    piece=st.integers(1, 12),
    n_steps=st.integers(0, 2 * JOIN_EVERY + 3),
    first=st.integers(0, 15),
    stop=st.one_of(st.none(), st.integers(0, 30)),
)
def test_any_policy_however_the_tokens_come(
    policies: list[str], n_prompt: int, piece: int, n_steps: int, first: int, stop: int | None
) -> None:
    """Prompts are read in pieces and completions token by token; the captured rows equal those of one forward."""
    batch = len(policies)
    whole = torch.randn(batch, n_prompt + n_steps, 2)
    requests = [RequestRows(plan(policy, first=first, stop=stop), n_prompt, MEMORY) for policy in policies]
    pieces = [whole[:, a : min(a + piece, n_prompt)] for a in range(0, n_prompt, piece)]
    fed = 0
    for part in [*pieces, *whole[:, n_prompt:].split(1, dim=1)]:
        if part.shape[1]:
            forward(list(requests), [part.shape[1]] * batch, part.shape[1], fed, x=part)
            fed += part.shape[1]
    end = whole.shape[1] if stop is None else min(stop, whole.shape[1])
    for request, policy, values in zip(requests, policies, whole, strict=True):
        wanted = {
            "all": range(end),
            "prompt": range(min(n_prompt, end)),
            "generated": range(n_prompt, end),
            "last_prompt": [n_prompt - 1],
            "last": [end - 1],
            "stride:3": range(0, end, 3),
            "mean_prompt": range(min(n_prompt, end)),
            "mean_generated": range(n_prompt, end),
        }[policy]
        wanted = [at for at in wanted if first <= at < end]
        expected = values[wanted]
        if policy.startswith("mean"):
            expected = expected.mean(0, keepdim=True) if wanted else expected
            wanted = [-1] * bool(wanted)
        captured = request.cut()
        assert captured.position.tolist() == wanted
        torch.testing.assert_close(captured.tensors["x"], expected, rtol=1e-5, atol=1e-6)


def test_a_forward_whose_rows_nobody_keeps_reads_nothing() -> None:
    request = RequestRows(plan("last_prompt"), 3, MEMORY)
    assert forward([request], [3], 3, x=torch.ones(1, 3, 2)).taps
    assert not forward([request], [1], 1, 3).taps
    assert len(request.cut().tensors["x"]) == 1


def test_a_long_request_does_not_keep_the_batch_alive() -> None:
    """After many steps, only the latest blocks may still be there; and the rows are all right."""
    request, blocks = RequestRows(plan(), 1, MEMORY), []
    for number in range(3 * JOIN_EVERY + 5):
        step = forward(
            [request, RequestRows(plan(), 1, MEMORY)], [1, 1], 1, number, x=torch.full((2, 1, 4), float(number))
        )
        blocks.append(weakref.ref(step._cohorts[0].blocks[0].tensor))
        del step
    gc.collect()
    assert sum(block() is not None for block in blocks) == 5
    rows = request.cut().tensors["x"]
    assert rows[:, 0].tolist() == list(range(3 * JOIN_EVERY + 5))


def test_what_was_joined_as_it_ended_is_not_copied_again() -> None:
    request = RequestRows(plan(), 1, MEMORY)
    for number in range(JOIN_EVERY):
        forward([request], [1], 1, number, x=torch.full((1, 1, 4), float(number)))
    once, again = request.cut().tensors["x"], request.cut().tensors["x"]
    assert once[:, 0].tolist() == list(range(JOIN_EVERY))
    assert once.data_ptr() == again.data_ptr()
