"""The memory in which captured rows lie: kept for the next ones on the host, pinned where they come from a GPU.

With every layer, the rows of one step's prompts are 100 MB and more, and a request's own live until the store has written
them. Pieces that large the C library returns to the system when they are freed, and the system clears every page of the next
one when it is first touched: that costs more than the copy that fills it. So pieces that are given back stay here, up to a
limit, and are used again. A GPU's own memory and pinned memory are torch's, which keeps them in the same way.
"""

import math
import weakref
from collections import deque

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

SMALLEST = 1 << 20
"""Bytes from which a piece is kept: what is smaller the C library keeps by itself."""
KEEP_BYTES = 512 << 20
"""The most that is kept unused."""
WASTE = 1.5
"""A kept piece is taken if it is at most so many times what is needed."""
ALIGNMENT = 64
"""Bytes: torch's own, for its vector instructions."""


def to_device(tensor: Shaped[Tensor, "..."], device: torch.device) -> Shaped[Tensor, "..."]:
    """Send a tensor of the host's to a device, without waiting for what that has to do: not from pinned memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class RowMemory:
    """Memory for one engine's rows. One thread takes it; any may drop a tensor, and its piece comes back."""

    def __init__(self) -> None:
        self._kept: deque[np.ndarray] = deque()  # the first has been here longest
        # Without a lock: a piece may come back while the taking thread, collecting garbage, holds one.
        self._returned: deque[np.ndarray] = deque()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Shaped[Tensor, "..."]:
        """Return an uninitialized tensor; on the host its memory comes back when nothing refers to it any more."""
        size = math.prod(shape) * dtype.itemsize
        if device.type != "cpu" or size < SMALLEST:
            return torch.empty(shape, dtype=dtype, device=device)
        piece = self._take(size)
        start = -piece.ctypes.data % ALIGNMENT
        lent = piece[start : start + size]
        weakref.finalize(lent, self._returned.append, piece).atexit = False
        return torch.from_numpy(lent).view(dtype).view(shape)

    def to_host(self, tensor: Shaped[Tensor, "..."]) -> tuple[Shaped[Tensor, "..."], torch.cuda.Event | None]:
        """Send a tensor to the host, beside what its GPU computes.

        Args:
            tensor: on any device; only a CUDA one is sent, to pinned memory, on a stream of its own.

        Returns:
            Where it will be, and the event after which it is there; None if that is now.
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
