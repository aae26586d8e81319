"""Allocates the memory of captured rows, and reuses it: plain memory on the host, pinned memory for copies from a GPU.

With every layer captured, the rows of one step's prompts take 100 MB and more, and a request's rows live until the store has
written them. When blocks that large are freed, the C library returns them to the system, and the system zeroes every page of
the next block at its first access. That costs more than the copy that fills the block. So freed blocks are kept here, up to a
limit, and reused. The memory of a GPU and pinned memory are PyTorch's, which reuses them in the same way.
"""

import math
import weakref
from collections import deque

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

SMALLEST = 1 << 20
"""Smallest block, in bytes, that is kept; the C library reuses smaller ones itself."""
KEEP_BYTES = 512 << 20
"""Limit of unused memory that is kept, in bytes."""
WASTE = 1.5
"""A kept block is reused if it is at most this many times as large as needed."""
ALIGNMENT = 64
"""Alignment in bytes, PyTorch's own, for its vector instructions."""


def to_device(tensor: Shaped[Tensor, "..."], device: torch.device) -> Shaped[Tensor, "..."]:
    """Copy a host tensor to a device without waiting for the device: through pinned memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class RowMemory:
    """Memory for one engine's rows. One thread allocates; any thread may drop a tensor, and its block is then reused."""

    def __init__(self) -> None:
        self._kept: deque[np.ndarray] = deque()  # the first has been here longest
        # No lock: a block may be returned while the allocating thread, collecting garbage, would hold it.
        self._returned: deque[np.ndarray] = deque()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Shaped[Tensor, "..."]:
        """Return an uninitialized tensor; on the host, its memory is reused when nothing refers to it any more."""
        size = math.prod(shape) * dtype.itemsize
        if device.type != "cpu" or size < SMALLEST:
            return torch.empty(shape, dtype=dtype, device=device)
        piece = self._take(size)
        start = -piece.ctypes.data % ALIGNMENT
        lent = piece[start : start + size]
        weakref.finalize(lent, self._returned.append, piece).atexit = False
        return torch.from_numpy(lent).view(dtype).view(shape)

    def to_host(self, tensor: Shaped[Tensor, "..."]) -> tuple[Shaped[Tensor, "..."], torch.cuda.Event | None]:
        """Copy a tensor to the host while its GPU continues to compute.

        Args:
            tensor: on any device; a CUDA tensor is copied to pinned memory, on a stream of its own.

        Returns:
            The host tensor, and the event after which the copy is complete; None if it is complete now.
        """
        device = tensor.device
        if device.type != "cuda":
            return tensor, None
        stream = self._streams.setdefault(device, torch.cuda.Stream(device))
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            host.copy_(tensor, non_blocking=True)
            copied = stream.record_event()
        # The allocator must not hand the memory to the model's stream before the copy has read it.
        tensor.record_stream(stream)
        return host, copied

    def _take(self, size: int) -> np.ndarray:
        self._sort_in()
        fitting = [piece for piece in self._kept if size <= piece.nbytes - ALIGNMENT <= WASTE * size]
        if not fitting:
            return np.empty(size + ALIGNMENT, dtype=np.uint8)
        best = min(fitting, key=lambda piece: piece.nbytes)
        self._kept = deque(piece for piece in self._kept if piece is not best)
        return best

    def _sort_in(self) -> None:
        while self._returned:
            self._kept.append(self._returned.popleft())
        unused = sum(piece.nbytes for piece in self._kept)
        while unused > KEEP_BYTES:
            unused -= self._kept.popleft().nbytes
