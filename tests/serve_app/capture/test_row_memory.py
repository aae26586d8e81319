"""The memory of captured rows: aligned, reused, never handed out twice, and limited."""

import threading
import tracemalloc
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.capture.row_memory import ALIGNMENT, KEEP_BYTES, SMALLEST, RowMemory

CPU = torch.device("cpu")


@pytest.fixture
def traced() -> Iterator[None]:
    """Count NumPy's allocations."""
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


def in_use() -> int:
    return tracemalloc.get_traced_memory()[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5, 7), (31, 400, 64), (2, 0, 9)])
def test_a_tensor_is_as_asked_for(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = RowMemory().empty(shape, dtype, CPU)
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    assert tensor.data_ptr() % ALIGNMENT == 0


def test_what_is_for_another_device_lies_there() -> None:
    assert RowMemory().empty((SMALLEST,), torch.float32, torch.device("meta")).device.type == "meta"


def test_memory_comes_back_when_the_last_view_is_gone(traced: None) -> None:
    memory = RowMemory()
    tensor = memory.empty((4, SMALLEST), torch.float32, CPU)
    view = tensor[1].view(torch.int32)
    before, address = in_use(), tensor.data_ptr()
    del tensor
    other = memory.empty((4, SMALLEST), torch.float32, CPU)
    assert other.data_ptr() != address
    assert in_use() - before > 4 * SMALLEST
    before = in_use()
    del view
    assert memory.empty((3, SMALLEST), torch.float32, CPU).data_ptr() == address
    assert in_use() - before < SMALLEST


def test_a_piece_much_larger_than_needed_is_not_taken(traced: None) -> None:
    memory = RowMemory()
    memory.empty((4, SMALLEST), torch.uint8, CPU)
    before = in_use()
    held = memory.empty((2, SMALLEST), torch.uint8, CPU)
    assert in_use() - before >= held.nbytes


def test_no_more_is_kept_than_the_limit_and_the_oldest_goes_first(traced: None) -> None:
    memory = RowMemory()
    oldest, newest = KEEP_BYTES // 8, KEEP_BYTES // 3
    before = in_use()
    tensors = [memory.empty((size,), torch.uint8, CPU) for size in (oldest, newest, newest, newest)]
    while tensors:
        del tensors[0]
    assert in_use() - before > KEEP_BYTES  # what came back is looked at when memory is taken
    first = memory.empty((newest - SMALLEST,), torch.uint8, CPU)
    kept = in_use()
    assert 2 * newest <= kept - before <= KEEP_BYTES
    second = memory.empty((newest - SMALLEST,), torch.uint8, CPU)
    assert in_use() - kept < SMALLEST
    assert first.data_ptr() != second.data_ptr()
    memory.empty((oldest,), torch.uint8, CPU)
    assert in_use() - kept >= oldest


def test_tensors_dropped_by_other_threads_come_back(traced: None) -> None:
    memory = RowMemory()
    tensors = [memory.empty((2, SMALLEST), torch.uint8, CPU) for _ in range(32)]
    before = in_use()
    threads = [threading.Thread(target=tensors.pop) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tensors = [memory.empty((2, SMALLEST), torch.uint8, CPU) for _ in range(32)]
    assert in_use() - before < SMALLEST


@given(st.lists(st.tuples(st.integers(1, 4 * SMALLEST), st.booleans(), st.integers(0, 7)), max_size=40))
@settings(max_examples=30, deadline=None)
def test_no_two_tensors_ever_share_memory(steps: list[tuple[int, bool, int]]) -> None:
    memory = RowMemory()
    held: dict[int, torch.Tensor] = {}
    for number, (size, drop, which) in enumerate(steps):
        if drop and held:
            del held[sorted(held)[which % len(held)]]
        held[number] = memory.empty((size,), torch.uint8, CPU).fill_(number)
        for kept_number, tensor in held.items():
            assert tensor[0] == kept_number
            assert tensor[-1] == kept_number
