"""Opens a session and reads it lazily, while writers go on appending.

`Session.open(uri)` lists nothing and loads nothing. `rollouts()` reads the index files (each once: they never change) into a
pandas table, of the columns asked for; `activations(key)` gives a sequence whose items are one rollout's rows of one key,
mapped from the shard on a disk, or asked of a bucket by range, several ahead. A probe over one layer therefore touches that
layer's bytes only.

Select with pandas and pass the rows that are left:

    session = Session.open("results/run/activations/my-session")
    right = session.rollouts().query("finish_reason == 'stop'")
    for rollout in session.activations("layers.12.resid_post", where=right, positions="last_prompt"):
        rollout.values            # [rows, d_model]
"""

import json
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import overload

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from roentgen.contract import Positions
from roentgen.store.index import IndexFile, ShardFile, read_index
from roentgen.store.places import Place, open_place
from roentgen.store.schema import INDEX_SCHEMA, CaptureSpec, SessionNotFoundError, StoreError, check_version
from roentgen.store.shards import Shard

_KEY_COLUMNS = ["config_hash", "problem_id", "epoch", "turn"]
LOCATION = ("rollout_id", *_KEY_COLUMNS, "shard", "row_start", "row_stop", "n_prompt", "n_completion")
"""The columns that reading activations needs; the others are texts and lists, which a million rollouts have a lot of."""
_READS_AT_ONCE = 16
_CACHED_TABLES = 4


class Session:
    """One session of a store, open for reading.

    Attributes:
        place: its folder.
        uri: its address.
        name: its id.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.uri = place.uri
        self.name = place.name
        self._tables: OrderedDict[tuple[str, ...] | None, dict[str, IndexFile]] = OrderedDict()
        # Shards never change, so an open one stays right. The bound keeps mappings and connections few.
        self.shard = lru_cache(maxsize=128)(self._open_shard)

    @classmethod
    def open(cls, uri: str | Path | Place) -> "Session":
        """Open a session by its address (the reply's `uri`, its folder, or its place in a bucket).

        Raises:
            SessionNotFoundError: if there is no session.
            StoreError: if it is of a newer schema, or cannot be reached.
        """
        place = open_place(uri)
        try:
            identity = json.loads(place.read("session.json"))
        except (FileNotFoundError, NotADirectoryError):
            raise SessionNotFoundError(f"{place.uri} is not a session: it has no session.json") from None
        except OSError as error:
            raise StoreError(f"session {place.uri} cannot be read: {error}") from error
        except ValueError as error:
            raise StoreError(f"{place.uri}/session.json is not JSON: {error}") from error
        check_version(str(identity.get("schema_version")), place.uri)
        return cls(place)

    def rollouts(self, *, unique: bool = True, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Read the index: one row per rollout, with `labels` as a dict.

        Args:
            unique: count a rollout that was retried once, by `(config_hash, problem_id, epoch, turn)`: the latest. Rollouts
                without a key are all kept.
            columns: which columns to read, beside `LOCATION`; all if None. A million rollouts' texts fill gigabytes.

        Raises:
            StoreError: if an index file is damaged.
        """
        wanted = None if columns is None else tuple(dict.fromkeys((*LOCATION, *columns)))
        files = self.index(wanted).values()
        table = pa.concat_tables([file.table for file in files]) if files else INDEX_SCHEMA.empty_table()
        # Files that were merged twice at the same time hold the same rollouts twice.
        frame = table.to_pandas().drop_duplicates("rollout_id", keep="last")
        if "labels" in frame:
            frame["labels"] = [json.loads(text) for text in frame["labels"]]
        if unique:
            frame = frame.sort_values("rollout_id", kind="stable")
            keyed = frame["config_hash"].notna()
            frame = frame[~keyed | ~frame.duplicated(_KEY_COLUMNS, keep="last")]
        return frame.reset_index(drop=True)

    def index(self, columns: Sequence[str] | None = None) -> dict[str, IndexFile]:
        """Read the index files that count now, in order of name (so, of time).

        Args:
            columns: which to read; all if None.

        Raises:
            StoreError: if one is damaged.
        """
        files = self.every_index(columns)
        replaced = {name for file in files.values() for name in file.replaces}
        return {name: file for name, file in files.items() if name not in replaced}

    def every_index(self, columns: Sequence[str] | None = None) -> dict[str, IndexFile]:
        """Read every index file, also those that another replaces.

        Raises:
            StoreError: if one is damaged.
        """
        folder, key = self.place.child("index"), None if columns is None else tuple(columns)
        known = self._tables.setdefault(key, {})
        self._tables.move_to_end(key)
        while len(self._tables) > _CACHED_TABLES:
            self._tables.popitem(last=False)
        for _ in range(3):
            names = [e.name for e in folder.entries() if e.name.endswith(".parquet") and not e.name.startswith(".")]
            new = [name for name in names if name not in known]
            try:
                if folder.remote and len(new) > 1:
                    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
                        known |= zip(new, pool.map(lambda name: read_index(folder, name, columns), new), strict=True)
                else:
                    for name in new:
                        known[name] = read_index(folder, name, columns)
            except FileNotFoundError:  # merged and collected since it was listed: what replaces it is there now
                continue
            for name in set(known) - set(names):
                del known[name]
            return {name: known[name] for name in names}
        raise StoreError(f"the index of {self.uri} changes faster than it can be read")

    def shard_files(self) -> dict[str, ShardFile | None]:
        """Return the shards that count, by name, with sizes and checksums (None where an index does not say)."""
        found: dict[str, ShardFile | None] = {}
        for file in self.index(LOCATION).values():
            for name in file.table.column("shard").unique().to_pylist():
                found[name] = file.shards.get(name)
        return found

    def spec(self, shard: str) -> CaptureSpec:
        """Return what a shard's rollouts have in common.

        Raises:
            StoreError: if the shard is missing, damaged or of a newer schema.
        """
        return self.shard(shard).spec

    def keys(self) -> list[str]:
        """Return every stored key of the session, in order of first appearance."""
        return list(dict.fromkeys(key for shard in self.shard_files() for key in self.spec(shard).keys))

    def activations(self, key: str, *, where: pd.DataFrame | None = None, positions: str = "all") -> "Activations":
        """Return a lazy sequence of one key's rows, one item per rollout.

        Args:
            key: a stored key, such as "layers.12.resid_post".
            where: rows of `rollouts()` to read, in the order wanted; all of them if None.
            positions: a position policy, applied to what is stored; pooled policies give one row.

        Raises:
            ValueError: if `positions` is not a policy.
        """
        frame = self.rollouts(columns=()) if where is None else where
        return Activations(self, key, frame, Positions.parse(positions))

    def _open_shard(self, name: str) -> Shard:
        return Shard(self.place, name)


@dataclass(frozen=True)
class RolloutRows:
    """One rollout's rows of one key.

    Attributes:
        rollout_id: whose rows.
        values: `[rows, *shape]`.
        position: sequence position per row, -1 for a pooled one, `[rows]`.
    """

    rollout_id: str
    values: Shaped[Tensor, "rows ..."]
    position: Int[np.ndarray, "rows"]


class Activations(Sequence[RolloutRows]):
    """A lazy sequence of `RolloutRows`; an item is read when it is asked for."""

    def __init__(self, session: Session, key: str, rollouts: pd.DataFrame, positions: Positions) -> None:
        self.key = key
        self.rollouts = rollouts
        self._session = session
        self._positions = positions

    def __len__(self) -> int:
        return len(self.rollouts)

    @overload
    def __getitem__(self, index: int) -> RolloutRows: ...
    @overload
    def __getitem__(self, index: slice) -> "Activations": ...
    def __getitem__(self, index: int | slice) -> "RolloutRows | Activations":
        if isinstance(index, slice):
            return Activations(self._session, self.key, self.rollouts.iloc[index], self._positions)
        return self._read(self.rollouts.iloc[index])

    def __iter__(self) -> Iterator[RolloutRows]:
        rows = (self.rollouts.iloc[index] for index in range(len(self)))
        if not self._session.place.remote:
            yield from map(self._read, rows)
            return
        with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
            ahead: deque[Future[RolloutRows]] = deque()
            for row in rows:
                ahead.append(pool.submit(self._read, row))
                if len(ahead) > _READS_AT_ONCE:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def stack(self) -> Shaped[Tensor, "rollouts ..."]:
        """Return one row per rollout, `[rollouts, *shape]`, for policies that give exactly one.

        Raises:
            StoreError: if a rollout gives another number of rows.
        """
        rows = []
        for item in self:
            if len(item.values) != 1:
                raise StoreError(
                    f"rollout {item.rollout_id} has {len(item.values)} rows of {self.key} at positions "
                    f"'{self._positions}'; stack() needs one (last_prompt, last, mean_prompt, mean_generated)"
                )
            rows.append(item.values[0])
        return torch.stack(rows) if rows else torch.empty(0)

    def _read(self, row: pd.Series) -> RolloutRows:
        shard = self._session.shard(row["shard"])
        if self.key not in shard.spec.keys:
            raise StoreError(
                f"{self.key} was not captured for rollout {row['rollout_id']}; it has {list(shard.spec.keys)}"
            )
        start, stop = int(row["row_start"]), int(row["row_stop"])
        position = shard.column("position")[start:stop]
        n_prompt, n_completion = int(row["n_prompt"]), int(row["n_completion"])
        stored = Positions.parse(shard.spec.positions)
        if self._positions.policy == "all" or self._positions == stored:
            return RolloutRows(row["rollout_id"], shard.rows(self.key, start, stop), position)

        wanted = self._positions.select(n_prompt, n_prompt + max(n_completion - 1, 0))
        if stored.pooled or not np.isin(wanted, position).all():
            raise StoreError(
                f"rollout {row['rollout_id']} stores positions '{stored}'; '{self._positions}' cannot be read from them"
            )
        rows = np.flatnonzero(np.isin(position, wanted))
        values = shard.gather(self.key, start, rows)
        if self._positions.pooled and len(values):
            # In float32: a bfloat16 mean over hundreds of rows would lose digits that the rows have.
            return RolloutRows(row["rollout_id"], values.float().mean(0, keepdim=True), np.array([-1], dtype=np.int32))
        return RolloutRows(row["rollout_id"], values, position[rows])
