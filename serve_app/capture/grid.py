"""Where the tokens of one forward lie in its batch.

A forward sees `[rows, width]` places. Row i holds one request's next tokens, a run of its sequence positions, at the row's
right end; what is left of them is padding. In a prefill that is a prompt or a piece of one, in a decode step one token. That
is a `Grid`. An engine that packs its batch has no padding: its forward sees the requests' tokens one after the other, a
`Strip`. What reads the batch (`rows`, `scoring`) and what changes it (`steering`) both find a request's tokens through this.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from serve_app.capture.memory import to_device


class Layout(Protocol):
    """One forward's layout."""

    @property
    def spans(self) -> list[range]:
        """Per request, the sequence positions it holds."""

    def places(self, row: int, positions: range) -> range:
        """Return where positions of a request lie among the places of the whole batch."""

    def flat(self, value: Float[Tensor, "..."]) -> Float[Tensor, "places ..."] | None:
        """Return a module's value as one row per place, None if it is not that."""

    def index(self, value: Float[Tensor, "..."], places: list[int]) -> tuple[Tensor, ...] | None:
        """Return what indexes these places of a value as the module has it; None if it has no row per place."""


@dataclass(frozen=True)
class Grid:
    """One forward's layout."""

    spans: list[range]
    """Per row, the sequence positions it holds; empty for a row of padding only."""
    width: int
    """Places per row."""

    @classmethod
    def of(cls, mask: Int[Tensor, "rows width"], positions: Int[Tensor, "rows width"]) -> "Grid":
        """Read the layout from what the model is given.

        Args:
            mask: of the new columns, 0 is padding.
            positions: their position ids; the last column is a token of every row that has any.
        """
        ends = (positions[:, -1] + 1).tolist()
        spans = [range(end - length, end) for end, length in zip(ends, mask.sum(1).tolist(), strict=True)]
        return cls(spans, mask.shape[1])

    def places(self, row: int, positions: range) -> range:
        """Return where positions of a row lie among the places of the whole batch, counted row after row."""
        shift = (row + 1) * self.width - self.spans[row].stop
        return range(positions.start + shift, positions.stop + shift, positions.step)

    def flat(self, value: Float[Tensor, "..."]) -> Float[Tensor, "places ..."] | None:
        """Return a module's value as one row per place, None if it is not that.

        A module may see batch and tokens as they are, or flattened.
        """
        n_rows = len(self.spans)
        if value.shape[:2] == (n_rows, self.width):
            return value.detach().reshape(n_rows * self.width, *value.shape[2:])
        if value.ndim and value.shape[0] == n_rows * self.width:
            return value.detach()
        return None

    def index(self, value: Float[Tensor, "..."], places: list[int]) -> tuple[Tensor, ...] | None:
        """Return what indexes these places of a value, batch and tokens as they are, or flattened."""
        n_rows, at = len(self.spans), torch.tensor(places, device=value.device)
        if value.shape[:2] == (n_rows, self.width):
            return at // self.width, at % self.width
        return (at,) if value.ndim and value.shape[0] == n_rows * self.width else None


class Strip:
    """One forward's layout where requests' tokens are packed one after the other: `[places, …]`, or `[1, places, …]`.

    Attributes:
        spans: per request, the sequence positions it holds.
    """

    def __init__(self, spans: list[range], lengths: list[int] | None = None) -> None:
        """Lay requests out in order.

        Args:
            spans: per request, the positions that count, at the end of what it holds.
            lengths: how many places each holds, if those are more: what is computed again is there, but does not count.
        """
        self.spans = spans
        self._ends = list(accumulate(lengths or [len(span) for span in spans]))

    @property
    def n_places(self) -> int:
        """Tokens of the whole batch."""
        return self._ends[-1] if self._ends else 0

    def places(self, row: int, positions: range) -> range:
        """Return where positions of a request lie in the strip."""
        shift = self._ends[row] - self.spans[row].stop
        return range(positions.start + shift, positions.stop + shift, positions.step)

    def flat(self, value: Float[Tensor, "..."]) -> Float[Tensor, "places ..."] | None:
        """Return a module's value as one row per place, None if it is not that."""
        if value.ndim and value.shape[0] == self.n_places:
            return value.detach()
        if value.shape[:2] == (1, self.n_places):
            return value.detach()[0]
        return None

    def index(self, value: Float[Tensor, "..."], places: list[int]) -> tuple[Tensor, ...] | None:
        """Return what indexes these places of a value; None if it has no row per place."""
        at = torch.tensor(places, device=value.device)
        if value.ndim and value.shape[0] == self.n_places:
            return (at,)
        return (torch.zeros_like(at), at) if value.shape[:2] == (1, self.n_places) else None


class Picked:
    """Places of a flattened batch, and how to read them: as a slice, which copies nothing, where nothing lies between them."""

    def __init__(self) -> None:
        self._places: list[int] = []
        self._picked: slice | Int[Tensor, "picked"] | None = None

    def __len__(self) -> int:
        return len(self._places)

    def extend(self, places: range) -> None:
        """Pick more places."""
        self._places.extend(places)

    def where(self, device: torch.device) -> slice | Int[Tensor, "picked"]:
        """Return what picks them from a value on a device."""
        if isinstance(self._picked, slice) or (self._picked is not None and self._picked.device == device):
            return self._picked
        first = self._places[0] if self._places else 0
        stop = first + len(self._places)
        if self._places == list(range(first, stop)):
            self._picked = slice(first, stop)
            return self._picked
        self._picked = to_device(torch.tensor(self._places, dtype=torch.long), device)
        return self._picked

    def of(self, flat: Float[Tensor, "places ..."]) -> Float[Tensor, "picked ..."]:
        """Return the rows at these places."""
        where = self.where(flat.device)
        return flat[where] if isinstance(where, slice) else flat.index_select(0, where)
