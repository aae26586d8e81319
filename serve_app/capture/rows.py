"""The rows kept of a running batch: copied once per step for all requests, cut per request when one ends.

A forward sees `[batch, tokens]` positions, of which some are padding and some belong to requests that capture nothing.
`StepRows` gathers the wanted positions of every tapped value into one compact slab, which is the only copy made during the
forward; each request then owns a span of that slab. When a request ends, its spans are joined into tensors of their own,
so that nothing keeps the batch's slabs alive.
"""

from dataclasses import dataclass, field

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


@dataclass
class _Span:
    slabs: dict[str, Tensor]
    start: int
    stop: int


@dataclass
class RequestRows:
    """The rows of one running request, as spans of the steps' slabs, in order of position."""

    plan: CapturePlan
    spans: list[_Span] = field(default_factory=list)

    def cut(self, n_prompt: int) -> CapturedRows:
        """Join this request's rows into tensors of their own and apply its position policy.

        Args:
            n_prompt: tokens in its prompt.

        Raises:
            RuntimeError: if a tapped module did not run in every forward (a layer that was skipped).
        """
        n_rows = sum(span.stop - span.start for span in self.spans)
        wanted = self.plan.positions.select(n_prompt, n_rows)
        tensors = {}
        for key in self.plan.taps:
            if any(key not in span.slabs for span in self.spans):
                raise RuntimeError(f"{key} was not computed in every forward, so it cannot be captured")
            rows = torch.cat([span.slabs[key][span.start : span.stop] for span in self.spans])
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
        """Copy the wanted rows of one tapped value (the observer's sink)."""
        # A module may see batch and tokens flattened; the positions are the same.
        shape = value.shape[2:] if value.shape[:2] == self._grid else value.shape[1:]
        flat = value.detach().reshape(self._grid[0] * self._grid[1], *shape)
        self._slabs[key] = flat.index_select(0, self._indices.to(value.device))

    def deliver(self) -> None:
        """Give each request its span, once the forward is done."""
        for request, start, stop in self._spans:
            request.spans.append(_Span(self._slabs, start, stop))
