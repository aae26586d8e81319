"""Rows of a running batch: gathered once per step, joined per request, never keeping the batch alive."""

import gc
import weakref

import pytest
import torch

from roentgen.contract import Positions, StoredDtype
from serve_app.capture.rows import JOIN_EVERY, CapturePlan, RequestRows, StepRows, UncapturableError
from serve_app.capture.structure import Tap

CPU = torch.device("cpu")


def plan(positions: str = "all", dtype: StoredDtype = "model") -> CapturePlan:
    return CapturePlan({"x": Tap("m", "output")}, Positions.parse(positions), dtype)


def test_padding_and_other_requests_rows_are_left_out() -> None:
    first, third = RequestRows(plan()), RequestRows(plan())
    step = StepRows([first, None, third], [2, 3, 1], width=3, device=CPU)
    value = torch.arange(9.0).reshape(3, 3, 1)
    step("x", value)
    step.deliver()
    assert first.cut(2).tensors["x"].flatten().tolist() == [1, 2]
    assert third.cut(1).tensors["x"].flatten().tolist() == [8]


def test_a_module_that_sees_batch_and_tokens_flattened() -> None:
    request = RequestRows(plan())
    step = StepRows([request, None], [2, 2], width=2, device=CPU)
    step("x", torch.arange(8.0).reshape(4, 2))
    step.deliver()
    assert request.cut(2).tensors["x"].tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize("value", [None, torch.ones(1, 5, 4), torch.ones(())])
def test_a_value_without_a_row_per_token_is_an_error_for_who_asked(value: torch.Tensor | None) -> None:
    """A module that did not run, or one whose value is not per token, such as a table of positions."""
    request = RequestRows(plan())
    step = StepRows([request, None], [5, 5], width=5, device=CPU)
    if value is not None:
        step("x", value)
    step.deliver()
    with pytest.raises(UncapturableError, match="x does not give a row per token"):
        request.cut(5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_dtype_asked_for(dtype: StoredDtype) -> None:
    request = RequestRows(plan(dtype=dtype))
    step = StepRows([request], [1], width=1, device=CPU)
    step("x", torch.ones(1, 1, 4))
    step.deliver()
    assert request.cut(1).tensors["x"].dtype == getattr(torch, dtype)


def test_a_long_request_does_not_keep_the_batch_alive() -> None:
    """After many steps, only the latest slabs may still be there; and the rows are all right."""
    request, slabs = RequestRows(plan()), []
    for number in range(3 * JOIN_EVERY + 5):
        step = StepRows([request, RequestRows(plan())], [1, 1], width=1, device=CPU)
        step("x", torch.full((2, 1, 4), float(number)))
        slabs.append(weakref.ref(step._slabs["x"]))
        step.deliver()
        del step
    gc.collect()
    assert sum(slab() is not None for slab in slabs) == 5
    rows = request.cut(1).tensors["x"]
    assert rows[:, 0].tolist() == list(range(3 * JOIN_EVERY + 5))
