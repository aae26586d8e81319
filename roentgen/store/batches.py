"""Shuffled batches of one key's rows, each row once, at disk speed: training data for a sparse autoencoder.

A full shuffle would read the rows one by one. Instead, rows are read in pieces of some hundred adjacent rows, the pieces in
random order, and pass through a shuffle buffer: each batch draws its rows from the buffer at random, and the next pieces
replace them. A batch mixes rows of as many pieces as the buffer holds. Memory holds the buffer and a few prefetched pieces;
the plan takes some bytes per rollout.

The order depends only on the seed and on the chosen rollouts and their order, not on timing or on how the store distributes
rows over files.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from roentgen.store.threads import limit_to_one_thread

POOL_BYTES = 256 << 20
PIECE_BYTES = 512 << 10
"""Size of a piece of adjacent rows: large enough for sequential disk speed."""
AHEAD = 16
"""Number of pieces prefetched."""
COPYING = 2
"""Threads that copy data read from a disk: more of them would wait for one another."""


class RowBatch(NamedTuple):
    """A batch of rows of one key from many rollouts."""

    values: Shaped[Tensor, "tokens ..."]
    """`[tokens, *shape]`; owns its memory."""
    rollout: Int[np.ndarray, "tokens"]
    """Index of each row's rollout in `Activations.rollouts`, `[tokens]`."""
    position: Int[np.ndarray, "tokens"]
    """Sequence position per row, -1 for a pooled one, `[tokens]`."""


class RowSource(Protocol):
    """A source of rows whose counts are known before they are read (`Activations`)."""

    @property
    def remote(self) -> bool:
        """True if reads wait for a network."""

    def count_rows(self) -> Int[np.ndarray, "rollouts"]:
        """Return the number of rows per rollout, `[rollouts]`."""

    def read_rows(self, starts: Int[np.ndarray, "parts"], stops: Int[np.ndarray, "parts"], first: int) -> RowBatch:
        """Return rows `[start, stop)` of each rollout, beginning with rollout `first`."""


@dataclass(frozen=True)
class TokenBatches:
    """Batches of rows; every iteration yields each row once, in the same order.

    Another `seed` gives another order: use the epoch number. The last batch may be smaller.
    """

    source: RowSource
    """The source of the rows."""
    tokens: int
    """Rows per batch."""
    shuffle: bool
    """True for random order instead of the order of the rollouts."""
    seed: int
    """Seed of the order."""
    pool_bytes: int = POOL_BYTES
    """Size of the shuffle buffer in bytes."""

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
            while parts := stream.take(self.tokens):
                yield _joined(parts)
            return
        capacity = min(max(self.pool_bytes // row_bytes, 2 * self.tokens), plan.total)
        yield from self._mix(stream, capacity, generator)

    def _mix(self, stream: "_Stream", capacity: int, generator: np.random.Generator) -> Iterator[RowBatch]:
        pool, count = None, 0
        while count < capacity and (parts := stream.take(min(self.tokens, capacity - count))):
            pool = pool or _empty(capacity, parts[0])
            count += _put(pool, np.arange(count, capacity), parts)
        assert pool is not None
        filled = np.arange(count)
        while parts := stream.take(self.tokens):
            drawn = generator.choice(capacity, self.tokens, replace=False)
            yield _pick(pool, drawn)
            came = _put(pool, drawn, parts)
            if came < self.tokens:  # end of the stream: the drawn places stay empty
                filled = np.delete(filled, drawn[came:])
        generator.shuffle(filled)
        for start in range(0, len(filled), self.tokens):
            yield _pick(pool, filled[start : start + self.tokens])

    def tensors(
        self, *, epochs: int | None = 1, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Iterator[Float[Tensor, "tokens d"]]:
        """Yield only the values, as trainers of sparse autoencoders take them, in a different order each epoch.

        Args:
            epochs: number of epochs; None for no limit.
            dtype: dtype of the values.
            device: device of the values.
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
    """Numbers the rows of all rollouts consecutively, and reads ranges of them."""

    def __init__(self, source: RowSource) -> None:
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
        """Yield the pieces that begin at the given rows, in this order, while threads prefetch the next ones."""
        threads = AHEAD if self._source.remote else COPYING
        with ThreadPoolExecutor(threads, "batches", limit_to_one_thread) as pool:
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
    """A stream of rows over consecutive pieces."""

    def __init__(self, pieces: Iterator[RowBatch]) -> None:
        self._pieces = pieces
        self._left: RowBatch | None = None

    def take(self, count: int) -> list[RowBatch]:
        """Return up to `count` next rows, in pieces; empty at the end."""
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
        return parts


def _joined(parts: Sequence[RowBatch]) -> RowBatch:
    values, rollouts, positions = zip(*parts, strict=True)
    return RowBatch(joined(values), np.concatenate(rollouts), np.concatenate(positions))


def joined(parts: Sequence[Shaped[Tensor, "rows ..."]]) -> Shaped[Tensor, "rows ..."]:
    """Concatenate parts into one tensor that owns its memory.

    NumPy copies the rows, here and below, on the calling thread: torch would distribute even a few rows over threads, and
    on a busy machine wait for the last of them a hundred times as long as the copy takes.
    """
    whole = torch.empty((sum(map(len, parts)), *parts[0].shape[1:]), dtype=parts[0].dtype)
    into, start = _as_items(whole), 0
    for part in parts:
        into[start : start + len(part)] = _as_items(part)
        start += len(part)
    return whole


def _as_items(values: Shaped[Tensor, "rows ..."]) -> Shaped[np.ndarray, "rows"]:
    """Return rows as NumPy void items, one per row, sharing the memory."""
    if not values.numel():
        return np.empty(len(values), dtype="V0")
    flat: np.ndarray = values.contiguous().view(len(values), -1).view(torch.uint8).numpy()
    return flat.view(f"V{flat.shape[1]}")[:, 0]


def _cut(batch: RowBatch, rows: slice) -> RowBatch:
    return RowBatch(batch.values[rows], batch.rollout[rows], batch.position[rows])


def _empty(rows: int, like: RowBatch) -> RowBatch:
    values = torch.empty((rows, *like.values.shape[1:]), dtype=like.values.dtype)
    return RowBatch(values, np.empty(rows, like.rollout.dtype), np.empty(rows, like.position.dtype))


def _pick(pool: RowBatch, rows: Int[np.ndarray, "tokens"]) -> RowBatch:
    """Copy rows out of the buffer."""
    values = _empty(len(rows), pool).values
    np.take(_as_items(pool.values), rows, out=_as_items(values), mode="clip")  # the only mode without an internal copy
    return RowBatch(values, pool.rollout[rows], pool.position[rows])


def _put(pool: RowBatch, rows: Int[np.ndarray, "places"], parts: Sequence[RowBatch]) -> int:
    """Write parts to the given places of the buffer in order; return the number of rows written."""
    start = 0
    for part in parts:
        into = rows[start : start + len(part.rollout)]
        _as_items(pool.values)[into] = _as_items(part.values)
        pool.rollout[into], pool.position[into] = part.rollout, part.position
        start += len(part.rollout)
    return start
