"""Where the tokens of one forward lie in its batch.

A forward sees `[rows, width]` places. Row i holds one request's next tokens, a run of its sequence positions, at the row's
right end; what is left of them is padding. In a prefill that is a prompt or a piece of one, in a decode step one token. What
reads the batch (`rows`, `scoring`) and what changes it (`steering`) both find a request's tokens through this.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """One forward's layout.

    Attributes:
        spans: per row, the sequence positions it holds; empty for a row of padding only.
        width: places per row.
    """

    spans: list[range]
    width: int

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
