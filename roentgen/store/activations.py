"""Lazy access to one key's rows of many rollouts.

An item is one rollout's rows. Consecutive rollouts of a shard are read together: memory-mapped from a disk, so that only
accessed pages are read, or fetched from a bucket as one range, with several requests in flight. A probe over one layer
therefore touches only that layer's bytes. `stack` is the fast path for a linear probe, with one row per rollout: it
computes the row indices of each shard and reads them together.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, overload

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from roentgen.contract import Positions, count_rows
from roentgen.store.batches import POOL_BYTES, RowBatch, TokenBatches, joined
from roentgen.store.schema import StoreError
from roentgen.store.shards import READS_AT_ONCE, Shard


@dataclass(frozen=True)
class RolloutRows:
    """One rollout's rows of one key."""

    rollout_id: str
    """The rollout's id."""
    values: Shaped[Tensor, "rows ..."]
    """`[rows, *shape]`."""
    position: Int[np.ndarray, "rows"]
    """Sequence position per row, -1 for a pooled one, `[rows]`."""


class _RolloutLocation(NamedTuple):
    """The location of a rollout's rows, from the index."""

    rollout_id: str
    shard: str
    row_start: int
    row_stop: int
    n_prompt: int
    n_completion: int


_ROWS_AT_ONCE = 2048
"""Maximum rows of one key read together; some megabytes."""


class Activations(Sequence[RolloutRows]):
    """A lazy sequence of `RolloutRows`; an item is read when it is accessed.

    Attributes:
        key: the stored key.
        rollouts: the rollouts, in this order: rows of the index.
        remote: True if reads wait for a network.
    """

    def __init__(
        self, open_shard: Callable[[str], Shard], remote: bool, key: str, rollouts: pd.DataFrame, positions: Positions
    ) -> None:
        self.key = key
        self.rollouts = rollouts
        self._open_shard = open_shard
        self.remote = remote
        self._positions = positions

    def __len__(self) -> int:
        return len(self.rollouts)

    def __repr__(self) -> str:
        return f"Activations({self.key!r}, positions={str(self._positions)!r}, {len(self)} rollouts)"

    @overload
    def __getitem__(self, index: int) -> RolloutRows: ...
    @overload
    def __getitem__(self, index: slice) -> "Activations": ...
    def __getitem__(self, index: int | slice) -> "RolloutRows | Activations":
        if isinstance(index, slice):
            chosen = self.rollouts.iloc[index]
            return Activations(self._open_shard, self.remote, self.key, chosen, self._positions)
        return self._read(list(_locations(self.rollouts.iloc[[index]])))[0]

    def __iter__(self) -> Iterator[RolloutRows]:
        groups = _group_adjacent(_locations(self.rollouts))
        if not self.remote:
            for adjacent in groups:
                yield from self._read(adjacent)
            return
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            ahead: deque[Future[list[RolloutRows]]] = deque()
            for adjacent in groups:
                ahead.append(pool.submit(self._read, adjacent))
                if len(ahead) > READS_AT_ONCE:
                    yield from ahead.popleft().result()
            while ahead:
                yield from ahead.popleft().result()

    def batches(
        self, tokens: int = 4096, *, shuffle: bool = True, seed: int = 0, pool_bytes: int = POOL_BYTES
    ) -> TokenBatches:
        """Return all rows as batches of `tokens` rows, each row once, read at disk speed in bounded memory.

            for batch in session.activations("layers.12.resid_post").batches(4096, seed=epoch):
                batch.values, batch.rollout, batch.position      # [4096, d_model], and the origin of each row

        Args:
            tokens: rows per batch; the last batch may be smaller.
            shuffle: True for random order instead of the order of the rollouts.
            seed: seed of the random order.
            pool_bytes: size of the shuffle buffer: the larger, the more rollouts contribute to a batch.

        Raises:
            ValueError: if a number is too small.
        """
        return TokenBatches(self, tokens, shuffle, seed, pool_bytes)

    def count_rows(self) -> Int[np.ndarray, "rollouts"]:
        """Return the number of rows per rollout, `[rollouts]`, without reading the rows.

        Raises:
            StoreError: if a shard cannot be opened.
        """
        codes, names, _, numbers = self._columns
        counts: np.ndarray = numbers[:, 1] - numbers[:, 0]
        if self._positions.policy == "all":
            return counts
        selects = [self._positions != Positions.parse(self._open_shard(name).spec.positions) for name in names]
        for number in np.flatnonzero(np.array(selects, dtype=bool)[codes]).tolist():
            n_prompt, n_completion = numbers[number, 2:].tolist()
            wanted = len(self._positions.select(n_prompt, count_rows(n_prompt, n_completion)))
            counts[number] = min(wanted, 1) if self._positions.pooled else wanted
        return counts

    def read_rows(self, starts: Int[np.ndarray, "parts"], stops: Int[np.ndarray, "parts"], first: int) -> RowBatch:
        """Read a range of rows from each of several consecutive rollouts.

        Args:
            starts: first row to read of each rollout, `[parts]`.
            stops: end of the range of each rollout, exclusive, `[parts]`.
            first: number of the first rollout.

        Raises:
            StoreError: if they cannot be read.
        """
        locations = [self._location(first + number) for number in range(len(starts))]
        cuts = [slice(int(start), int(stop)) for start, stop in zip(starts, stops, strict=True)]
        parts: list[tuple[Tensor, np.ndarray]] = []
        begin = 0
        for end in range(1, len(locations) + 1):
            if end == len(locations) or locations[end].shard != locations[begin].shard:
                parts.append(self._read_parts(locations[begin:end], cuts[begin:end]))
                begin = end
        values, positions = zip(*parts, strict=True)
        rollout = np.repeat(np.arange(first, first + len(starts)), stops - starts)
        return RowBatch(joined(values), rollout, np.concatenate(positions))

    def stack(self) -> Shaped[Tensor, "rollouts ..."]:
        """Return one row per rollout, `[rollouts, *shape]`, for position policies that select exactly one.

        Raises:
            StoreError: if a rollout has a different number of rows.
        """
        frame = self.rollouts.reset_index(drop=True)
        shards = list(frame.groupby("shard", sort=False, observed=True))
        if not shards:
            return torch.empty(0)
        stacked = torch.cat([self._stack(self._open_shard(str(name)), own) for name, own in shards])
        at = np.concatenate([own.index.to_numpy() for _, own in shards])
        return stacked if (at[1:] > at[:-1]).all() else stacked[torch.from_numpy(np.argsort(at))]

    def _stack(self, shard: Shard, own: pd.DataFrame) -> Shaped[Tensor, "rollouts ..."]:
        rows = self._one_row_each(shard, own)
        if rows is not None:
            return shard.values(self.key, rows)
        found = []
        for item in self._read(list(_locations(own))):
            if len(item.values) != 1:
                raise StoreError(
                    f"rollout {item.rollout_id} has {len(item.values)} rows of {self.key} at positions "
                    f"'{self._positions}'; stack() needs one (last_prompt, last, mean_prompt, mean_generated)"
                )
            found.append(item.values)
        return torch.cat(found)

    def _one_row_each(self, shard: Shard, own: pd.DataFrame) -> Int[np.ndarray, "rollouts"] | None:
        """Return the shard's row of each rollout for a single-position policy; None if the fast path does not apply."""
        start, stop, n_prompt, n_completion = (
            own[name].to_numpy(np.int64) for name in ("row_start", "row_stop", "n_prompt", "n_completion")
        )
        if self._positions.policy not in ("last_prompt", "last") or self.key not in shard.spec.keys:
            return None
        if not (start < stop).all():
            return None
        wanted = (n_prompt if self._positions.policy == "last_prompt" else count_rows(n_prompt, n_completion)) - 1
        # Rows have consecutive positions under every policy except a stride and the pooled ones.
        position = shard.column("position")
        rows = start + wanted - position[start]
        inside = ((start <= rows) & (rows < stop)).all()
        return rows if inside and (position[rows] == wanted).all() else None

    def _read_parts(
        self, locations: Sequence[_RolloutLocation], cuts: Sequence[slice]
    ) -> tuple[Shaped[Tensor, "rows ..."], Int[np.ndarray, "rows"]]:
        """Read ranges of several rollouts of one shard: values, which own their memory, and positions."""
        shard = self._shard_of(locations[0])
        stored = Positions.parse(shard.spec.positions)
        if self._positions.pooled and self._positions != stored:
            items = [
                (item.values[cut], item.position[cut]) for item, cut in zip(self._read(locations), cuts, strict=True)
            ]
            return torch.cat([values for values, _ in items]), np.concatenate([position for _, position in items])
        position = shard.column("position")
        rows = np.concatenate(
            [self._rows(shard, location, position, stored)[cut] for location, cut in zip(locations, cuts, strict=True)]
        )
        # One request instead of the kernel's own read-ahead; rows in another order are announced when they are taken.
        if len(rows) and not self.remote and (np.diff(rows) > 0).all():
            shard.expect(self.key, int(rows[0]), int(rows[-1]) + 1)
        return shard.values(self.key, rows), position[rows]

    def _location(self, number: int) -> _RolloutLocation:
        """Return the location of one rollout; slicing the table would be slower than reading some rows."""
        codes, names, ids, numbers = self._columns
        row_start, row_stop, n_prompt, n_completion = numbers[number].tolist()
        return _RolloutLocation(ids[number].as_py(), names[codes[number]], row_start, row_stop, n_prompt, n_completion)

    @cached_property
    def _columns(
        self,
    ) -> tuple[Int[np.ndarray, "rollouts"], list[str], "pa.StringArray", Int[np.ndarray, "rollouts 4"]]:
        codes, names = pd.factorize(self.rollouts["shard"])
        numbers = self.rollouts[["row_start", "row_stop", "n_prompt", "n_completion"]].to_numpy(np.int64)
        return codes, [str(name) for name in names], pa.array(self.rollouts["rollout_id"], pa.string()), numbers

    def _shard_of(self, location: _RolloutLocation) -> Shard:
        shard = self._open_shard(location.shard)
        if self.key not in shard.spec.keys:
            raise StoreError(
                f"{self.key} was not captured for rollout {location.rollout_id}; it has {list(shard.spec.keys)}"
            )
        return shard

    def _read(self, locations: Sequence[_RolloutLocation]) -> list[RolloutRows]:
        """Read several rollouts of one shard."""
        shard = self._shard_of(locations[0])
        position = shard.column("position")
        stored = Positions.parse(shard.spec.positions)
        wanted = [self._rows(shard, location, position, stored) for location in locations]
        values = shard.values(self.key, np.concatenate(wanted)).split([len(rows) for rows in wanted])
        found = []
        for location, rows, own in zip(locations, wanted, values, strict=True):
            if self._positions.pooled and self._positions != stored and len(own):
                # In float32: a bfloat16 mean over hundreds of rows would lose precision.
                mean = own.float().mean(0, keepdim=True)
                found.append(RolloutRows(location.rollout_id, mean, np.array([-1], dtype=np.int32)))
            else:
                found.append(RolloutRows(location.rollout_id, own, position[rows]))
        return found

    def _rows(
        self, shard: Shard, location: _RolloutLocation, position: Int[np.ndarray, "rows"], stored: Positions
    ) -> Int[np.ndarray, "wanted"]:
        """Return the shard's rows for a rollout's selected positions."""
        shard.check(self.key, location.row_start, location.row_stop)
        rows = np.arange(location.row_start, location.row_stop)
        if self._positions.policy == "all" or self._positions == stored:
            return rows
        own = position[rows]
        wanted = self._positions.select(location.n_prompt, count_rows(location.n_prompt, location.n_completion))
        if stored.pooled or not np.isin(wanted, own).all():
            raise StoreError(
                f"rollout {location.rollout_id} stores positions '{stored}'; '{self._positions}' cannot be read from them"
            )
        return rows[np.isin(own, wanted)]


def _locations(frame: pd.DataFrame) -> Iterator[_RolloutLocation]:
    return map(_RolloutLocation._make, frame[list(_RolloutLocation._fields)].itertuples(index=False, name=None))


def _group_adjacent(locations: Iterator[_RolloutLocation]) -> Iterator[list[_RolloutLocation]]:
    """Group rollouts that are adjacent in a shard, up to a number of rows."""
    adjacent: list[_RolloutLocation] = []
    for location in locations:
        if adjacent and (
            location.shard != adjacent[-1].shard
            or location.row_start != adjacent[-1].row_stop
            or location.row_stop - adjacent[0].row_start > _ROWS_AT_ONCE
        ):
            yield adjacent
            adjacent = []
        adjacent.append(location)
    if adjacent:
        yield adjacent
