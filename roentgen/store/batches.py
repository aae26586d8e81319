"""One key's rows as shuffled batches, every row once, at the speed of the disk: what a sparse autoencoder is trained on.

A shuffle of all rows would read them one by one. So rows are read in pieces of some hundred, neighbors of one another, the
pieces in random order; and they pass through a pool, from which each batch draws its rows at random while the next pieces
take their places. A batch then mixes rows of as many pieces as the pool holds. The pool is all that memory holds, beside a few
pieces that threads read ahead; the plan takes some bytes per rollout.

The order depends on the seed and on which rollouts were chosen, in which order, and on nothing else: neither on time nor on how
the store has put rows into files.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from roentgen.store.threads import compute_alone

POOL_BYTES = 256 << 20
PIECE_BYTES = 512 << 10
"""Of neighboring rows that are read together: enough that a disk reads them as fast as in order."""
AHEAD = 8
"""Pieces that are read ahead."""


class RowBatch(NamedTuple):
    """Rows of one key, of many rollouts."""

    values: Shaped[Tensor, "tokens ..."]
    """`[tokens, *shape]`, owning their memory."""
    rollout: Int[np.ndarray, "tokens"]
    """Whose each row is: its place in `Activations.rollouts`, `[tokens]`."""
    position: Int[np.ndarray, "tokens"]
    """Sequence position per row, -1 for a pooled one, `[tokens]`."""


class Rows(Protocol):
    """Rows that are counted before they are read (`Activations`)."""

    def count_rows(self) -> Int[np.ndarray, "rollouts"]:
        """Return how many rows each rollout gives, `[rollouts]`."""

    def read_rows(self, starts: Int[np.ndarray, "parts"], stops: Int[np.ndarray, "parts"], first: int) -> RowBatch:
        """Return rows `[start, stop)` of each of the rollouts from the place `first` on."""


@dataclass(frozen=True)
class TokenBatches:
    """Batches of rows; each time that it is iterated over, every row comes once, in the same order.

    Another `seed` gives another order: take the epoch's number. The last batch holds what is left.
    """

    source: Rows
    """The rows."""
    tokens: int
    """Rows in a batch."""
    shuffle: bool
    """Whether rows come in random order, instead of in the order of the rollouts."""
    seed: int
    """Of the order."""
    pool_bytes: int = POOL_BYTES
    """Of the rows that are mixed."""

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("seed", 0), ("pool_bytes", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)} is not allowed; allowed are numbers from {least}")

    def __len__(self) -> int:
        return -(-int(self.source.count_rows().sum()) // self.tokens)

    def __iter__(self) -> Iterator[RowBatch]:
        plan = _Plan(self.source)
        if not plan.total:
            return
        row_bytes = plan.row_bytes()
        piece = max(1, PIECE_BYTES // row_bytes)
        pieces = np.arange(-(-plan.total // piece))
        generator = np.random.default_rng(self.seed)
        if self.shuffle:
            generator.shuffle(pieces)
        stream = _Stream(plan.read_ahead(pieces * piece, piece))
        if not self.shuffle:
            while (batch := stream.take(self.tokens)) is not None:
                yield batch
            return
        yield from self._mix(stream, max(self.pool_bytes // row_bytes, 2 * self.tokens), generator)

    def _mix(self, stream: "_Stream", capacity: int, generator: np.random.Generator) -> Iterator[RowBatch]:
        pool = stream.take(capacity)
        if pool is None:
            return
        filled = np.arange(len(pool.rollout))
        while (more := stream.take(self.tokens)) is not None:
            # The pool is full here: had the stream ended before, it would have nothing more.
            drawn = generator.choice(capacity, self.tokens, replace=False)
            yield _pick(pool, drawn)
            _put(pool, drawn[: len(more.rollout)], more)
            if len(more.rollout) < self.tokens:  # the last of them: what was drawn stays empty
                filled = np.delete(filled, drawn[len(more.rollout) :])
        generator.shuffle(filled)
        for start in range(0, len(filled), self.tokens):
            yield _pick(pool, filled[start : start + self.tokens])

    def tensors(
        self, *, epochs: int | None = 1, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Iterator[Float[Tensor, "tokens d"]]:
        """Yield the values alone, as trainers of sparse autoencoders take them, each epoch in an order of its own.

        Args:
            epochs: how often every row comes; None for as often as is asked.
            dtype: what to make of the stored values.
            device: where to put them.
        """
        epoch = 0
        while epochs is None or epoch < epochs:
            empty = True
            for batch in TokenBatches(self.source, self.tokens, self.shuffle, self.seed + epoch, self.pool_bytes):
                empty = False
                yield batch.values.to(device, dtype)
            if empty:
                return
            epoch += 1


class _Plan:
    """Which rows there are, numbered through all rollouts, and how stretches of them are read."""

    def __init__(self, source: Rows) -> None:
        self._source = source
        self._ends = np.cumsum(source.count_rows())
        self.total = int(self._ends[-1]) if len(self._ends) else 0

    def row_bytes(self) -> int:
        values = self.read(0, 1).values
        return max(1, values.nbytes)

    def read(self, start: int, stop: int) -> RowBatch:
        """Return rows `[start, stop)`."""
        stop = min(stop, self.total)
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right")
        ends = self._ends[first : last + 1]
        begins = np.concatenate([[self._ends[first - 1] if first else 0], ends[:-1]])
        return self._source.read_rows(np.maximum(start, begins) - begins, np.minimum(stop, ends) - begins, int(first))

    def read_ahead(self, starts: Int[np.ndarray, "pieces"], size: int) -> Iterator[RowBatch]:
        """Yield the pieces that begin at given rows, in this order, while threads read the next ones."""
        with ThreadPoolExecutor(AHEAD, "batches", compute_alone) as pool:
            ahead: deque[Future[RowBatch]] = deque()
            try:
                for start in starts.tolist():
                    ahead.append(pool.submit(self.read, start, start + size))
                    if len(ahead) >= AHEAD:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()


class _Stream:
    """Pieces as one stream of rows, of which any number is taken."""

    def __init__(self, pieces: Iterator[RowBatch]) -> None:
        self._pieces = pieces
        self._left: RowBatch | None = None

    def take(self, count: int) -> RowBatch | None:
        """Return the next rows, as many as there are up to `count`; None at the end."""
        parts: list[RowBatch] = []
        missing = count
        while missing:
            piece = self._left or next(self._pieces, None)
            self._left = None
            if piece is None:
                break
            if len(piece.rollout) > missing:
                self._left = _cut(piece, slice(missing, None))
                piece = _cut(piece, slice(missing))
            parts.append(piece)
            missing -= len(piece.rollout)
        if not parts:
            return None
        values, rollouts, positions = zip(*parts, strict=True)
        return RowBatch(torch.cat(values), np.concatenate(rollouts), np.concatenate(positions))


def _cut(batch: RowBatch, rows: slice) -> RowBatch:
    return RowBatch(batch.values[rows], batch.rollout[rows], batch.position[rows])


def _pick(pool: RowBatch, rows: Int[np.ndarray, "tokens"]) -> RowBatch:
    return RowBatch(pool.values[torch.from_numpy(rows)], pool.rollout[rows], pool.position[rows])


def _put(pool: RowBatch, rows: Int[np.ndarray, "tokens"], more: RowBatch) -> None:
    pool.values[torch.from_numpy(rows)] = more.values
    pool.rollout[rows] = more.rollout
    pool.position[rows] = more.position
