"""The rows kept of a running batch: copied once per step for all requests, cut per request when one ends.

A forward sees `[batch, tokens]` positions, of which some are padding and some belong to requests that capture nothing.
`StepRows` gathers the wanted positions of every tapped value into one compact slab, which is the only copy made during the
forward; each request then owns a span of that slab. Every few steps, and when it ends, a request's spans are joined into
tensors of its own, so that a long request does not keep alive the rows of all that ran beside it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from roentgen.contract import Positions, StoredDtype
from serve_app.capture.structure import Tap


@dataclass(frozen=True)
class CapturePlan:
    """What one request keeps.

    Attributes:
        taps: per stored key, where to read.
        positions: which of its rows.
        dtype: what to store them as.
    """

    taps: dict[str, Tap]
    positions: Positions
    dtype: StoredDtype


@dataclass(frozen=True)
class CapturedRows:
    """A finished request's rows, on the CPU, owning their memory.

    Attributes:
        tensors: per stored key, `[rows, *shape]`.
        position: sequence position per row, -1 for a pooled row, `[rows]`.
    """

    tensors: dict[str, Float[Tensor, "rows ..."]]
    position: Int[np.ndarray, "rows"]


class UncapturableError(Exception):
    """A request's hook point gave no row per token, so what it asked for cannot be kept; the message names the key."""


JOIN_EVERY = 32
"""Steps after which a request's rows are copied out of the steps' slabs, which hold the rows of the whole batch."""


@dataclass
class _Span:
    slabs: dict[str, Tensor]
    start: int
    stop: int


class RequestRows:
    """The rows of one running request: spans of the latest steps' slabs, and what has been copied out of earlier ones."""

    def __init__(self, plan: CapturePlan) -> None:
        self.plan = plan
        self._own: list[_Span] = []
        self._shared: list[_Span] = []
        self._missing: str | None = None

    def add(self, slabs: dict[str, Tensor], start: int, stop: int) -> None:
        """Take rows `[start, stop)` of a step's slabs, the next ones in order of position."""
        self._missing = self._missing or next((key for key in self.plan.taps if key not in slabs), None)
        if self._missing:
            return  # said in `cut`: others in this forward have what they asked for
        self._shared.append(_Span(slabs, start, stop))
        if len(self._shared) >= JOIN_EVERY:
            rows = {key: _join(self._shared, key) for key in self.plan.taps}
            self._own.append(_Span(rows, 0, sum(span.stop - span.start for span in self._shared)))
            self._shared = []

    def cut(self, n_prompt: int) -> CapturedRows:
        """Join this request's rows into tensors of their own and apply its position policy.

        Args:
            n_prompt: tokens in its prompt.

        Raises:
            UncapturableError: if a tapped module did not run in every forward, or gave no row per token.
        """
        if self._missing:
            raise UncapturableError(f"{self._missing} does not give a row per token, so it cannot be captured")
        spans = self._own + self._shared
        n_rows = sum(span.stop - span.start for span in spans)
        wanted = self.plan.positions.select(n_prompt, n_rows)
        tensors = {}
        for key in self.plan.taps:
            rows = _join(spans, key)
            if self.plan.positions.pooled:
                # In float32: a bfloat16 sum over hundreds of rows would lose digits that the rows have.
                rows = rows[wanted].float().mean(0, keepdim=True).to(rows.dtype) if wanted else rows[:0]
            elif len(wanted) != n_rows:
                rows = rows[wanted]
            if self.plan.dtype != "model":
                rows = rows.to(getattr(torch, self.plan.dtype))
            tensors[key] = rows.cpu()
        position = [-1] * bool(wanted) if self.plan.positions.pooled else wanted
        return CapturedRows(tensors, np.array(position, dtype=np.int32))


def _join(spans: list[_Span], key: str) -> Float[Tensor, "rows ..."]:
    """Copy the rows of spans, in order, into one tensor."""
    return torch.cat([span.slabs[key][span.start : span.stop] for span in spans])


class StepRows:
    """One forward's sink: gathers the wanted rows of each tapped value into a slab."""

    def __init__(
        self, requests: list[RequestRows | None], lengths: list[int], width: int, device: torch.device
    ) -> None:
        """Lay out one forward's rows.

        Args:
            requests: per batch row, the request's rows, None if it captures nothing.
            lengths: per batch row, how many of its tokens are not padding; padding is on the left.
            width: tokens per batch row, padding included.
            device: of the model.
        """
        self._slabs: dict[str, Tensor] = {}
        self._spans: list[tuple[RequestRows, int, int]] = []
        indices: list[int] = []
        for row, (request, length) in enumerate(zip(requests, lengths, strict=True)):
            if request is not None:
                self._spans.append((request, len(indices), len(indices) + length))
                indices.extend(range((row + 1) * width - length, (row + 1) * width))
        self._grid = (len(requests), width)
        self._indices = torch.tensor(indices, dtype=torch.long, device=device)

    def __call__(self, key: str, value: Float[Tensor, "batch tokens ..."]) -> None:
        """Copy the wanted rows of one tapped value (the observer's sink); a value without a row per token is left out."""
        rows, width = self._grid
        if value.shape[:2] == self._grid:
            shape = value.shape[2:]
        elif value.ndim and value.shape[0] == rows * width:  # a module may see batch and tokens flattened
            shape = value.shape[1:]
        else:
            return
        flat = value.detach().reshape(rows * width, *shape)
        self._slabs[key] = flat.index_select(0, self._indices.to(value.device))

    def deliver(self) -> None:
        """Give each request its span, once the forward is done."""
        for request, start, stop in self._spans:
            request.add(self._slabs, start, stop)
