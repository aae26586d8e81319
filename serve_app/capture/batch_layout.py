"""Maps requests and sequence positions to rows of one forward's batch.

A forward processes some of the next tokens of each of its requests: in a prefill a prompt or a piece of one, in a decode step
one token. There are two layouts:

- `PaddedBatch`: `[rows, width]`. Row i holds one request's tokens at its right end, and padding to the left of them.
- `PackedBatch`: `[tokens]`. The requests' tokens follow one another without padding.

What reads the batch (`rows`, `probe_scores`) and what changes it (`steering`) find a request's tokens through a `BatchLayout`.
A *flat index* counts tokens over the whole batch, padding included, row after row.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from serve_app.capture.row_memory import to_device


class BatchLayout(Protocol):
    """The layout of one forward's batch."""

    @property
    def spans(self) -> list[range]:
        """Per request, the sequence positions of its tokens in this forward."""

    def flat_indices(self, row: int, positions: range) -> range:
        """Return the flat indices of a request's positions."""

    def flat(self, value: Float[Tensor, "..."]) -> Float[Tensor, "tokens ..."] | None:
        """Return a module's value with one row per token of the batch; None if it has another shape."""

    def index(self, value: Float[Tensor, "..."], indices: list[int]) -> tuple[Tensor, ...] | None:
        """Return an index into a module's value that selects these flat indices; None if the value has no row per token."""


@dataclass(frozen=True)
class PaddedBatch:
    """A batch with one row per request, padded on the left."""

    spans: list[range]
    """Per row, the sequence positions of its tokens; empty for a row of padding only."""
    width: int
    """Columns of the batch."""

    @classmethod
    def of(cls, mask: Int[Tensor, "rows width"], positions: Int[Tensor, "rows width"]) -> "PaddedBatch":
        """Derive the layout from a model's inputs.

        Args:
            mask: attention mask of the new columns; 0 is padding.
            positions: position ids of the new columns; the last column is a token of every row that has tokens.
        """
        ends = (positions[:, -1] + 1).tolist()
        spans = [range(end - length, end) for end, length in zip(ends, mask.sum(1).tolist(), strict=True)]
        return cls(spans, mask.shape[1])

    def flat_indices(self, row: int, positions: range) -> range:
        """See `BatchLayout.flat_indices`."""
        shift = (row + 1) * self.width - self.spans[row].stop
        return range(positions.start + shift, positions.stop + shift, positions.step)

    def flat(self, value: Float[Tensor, "..."]) -> Float[Tensor, "tokens ..."] | None:
        """See `BatchLayout.flat`."""
        n_rows = len(self.spans)
        if value.shape[:2] == (n_rows, self.width):
            return value.detach().reshape(n_rows * self.width, *value.shape[2:])
        if value.ndim and value.shape[0] == n_rows * self.width:
            return value.detach()
        return None

    def index(self, value: Float[Tensor, "..."], indices: list[int]) -> tuple[Tensor, ...] | None:
        """See `BatchLayout.index`; batch and token axes may be separate or flattened."""
        n_rows, at = len(self.spans), torch.tensor(indices, device=value.device)
        if value.shape[:2] == (n_rows, self.width):
            return at // self.width, at % self.width
        return (at,) if value.ndim and value.shape[0] == n_rows * self.width else None


class PackedBatch:
    """A batch of requests' tokens without padding: `[tokens, …]`, or `[1, tokens, …]`.

    Attributes:
        spans: per request, the sequence positions of its tokens that count.
    """

    def __init__(self, spans: list[range], lengths: list[int] | None = None) -> None:
        """Lay out requests in order.

        Args:
            spans: per request, the positions that count; they are the last ones of its tokens in the batch.
            lengths: per request, its tokens in the batch, if there are more than count: recomputed tokens are in the batch but
                do not count.
        """
        self.spans = spans
        self._ends = list(accumulate(lengths or [len(span) for span in spans]))

    @property
    def n_tokens(self) -> int:
        """Number of tokens in the batch."""
        return self._ends[-1] if self._ends else 0

    def flat_indices(self, row: int, positions: range) -> range:
        """See `BatchLayout.flat_indices`."""
        shift = self._ends[row] - self.spans[row].stop
        return range(positions.start + shift, positions.stop + shift, positions.step)

    def flat(self, value: Float[Tensor, "..."]) -> Float[Tensor, "tokens ..."] | None:
        """See `BatchLayout.flat`; batch and token axes may be separate or flattened."""
        if value.ndim and value.shape[0] == self.n_tokens:
            return value.detach()
        if value.shape[:2] == (1, self.n_tokens):
            return value.detach()[0]
        return None

    def index(self, value: Float[Tensor, "..."], indices: list[int]) -> tuple[Tensor, ...] | None:
        """See `BatchLayout.index`."""
        at = torch.tensor(indices, device=value.device)
        if value.ndim and value.shape[0] == self.n_tokens:
            return (at,)
        return (torch.zeros_like(at), at) if value.shape[:2] == (1, self.n_tokens) else None


class RowSelection:
    """A selection of rows of a flattened batch.

    Contiguous rows are selected by a slice, which copies nothing, and others by an index tensor.
    """

    def __init__(self) -> None:
        self._indices: list[int] = []
        self._index: slice | Int[Tensor, "selected"] | None = None

    def __len__(self) -> int:
        return len(self._indices)

    def extend(self, indices: range) -> None:
        """Add rows to the selection."""
        self._indices.extend(indices)

    def where(self, device: torch.device) -> slice | Int[Tensor, "selected"]:
        """Return an index that selects the rows from a value on a device."""
        if isinstance(self._index, slice) or (self._index is not None and self._index.device == device):
            return self._index
        first = self._indices[0] if self._indices else 0
        stop = first + len(self._indices)
        if self._indices == list(range(first, stop)):
            self._index = slice(first, stop)
            return self._index
        self._index = to_device(torch.tensor(self._indices, dtype=torch.long), device)
        return self._index

    def of(self, flat: Float[Tensor, "tokens ..."]) -> Float[Tensor, "selected ..."]:
        """Return the selected rows."""
        where = self.where(flat.device)
        return flat[where] if isinstance(where, slice) else flat.index_select(0, where)
