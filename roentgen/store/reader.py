"""Opens a session and reads it lazily, while writers go on appending.

`Session.open(uri)` lists nothing and loads nothing. `rollouts()` reads the index files (each once: they never change) into a
pandas table; `activations(key)` gives a sequence whose items map one rollout's rows of one key from the shard. A probe over
one layer therefore touches that layer's bytes only.

Select with pandas and pass the rows that are left:

    session = Session.open("results/run/activations/my-session")
    right = session.rollouts().query("finish_reason == 'stop'")
    for rollout in session.activations("layers.12.resid_post", where=right, positions="last_prompt"):
        rollout.values            # [rows, d_model]
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import overload

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Int, Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor

from roentgen.contract import Positions
from roentgen.store.durable import local_root
from roentgen.store.schema import INDEX_SCHEMA, CaptureSpec, SessionNotFoundError, StoreError, check_version, read_spec

_KEY_COLUMNS = ["config_hash", "problem_id", "epoch", "turn"]


class Session:
    """One session of a store, open for reading.

    Attributes:
        path: its folder.
        name: its id.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self._tables: dict[str, pa.Table] = {}

    @classmethod
    def open(cls, uri: str | Path) -> "Session":
        """Open a session by its address (the reply's `uri`, or its folder).

        Raises:
            SessionNotFoundError: if there is no session.
            StoreError: if it is of a newer schema.
        """
        path = local_root(uri)
        try:
            identity = json.loads((path / "session.json").read_text())
        except FileNotFoundError:
            raise SessionNotFoundError(f"{path} is not a session: it has no session.json") from None
        except json.JSONDecodeError as error:
            raise StoreError(f"{path / 'session.json'} is not JSON: {error}") from error
        check_version(str(identity.get("schema_version")), str(path))
        return cls(path)

    def index_files(self) -> list[Path]:
        """Return the committed index files, in order of name (so, of time)."""
        return sorted(p for p in (self.path / "index").glob("*.parquet") if not p.name.startswith("."))

    def rollouts(self, *, unique: bool = True) -> pd.DataFrame:
        """Read the index: one row per rollout, with `labels` as a dict.

        Args:
            unique: count a rollout that was retried once, by `(config_hash, problem_id, epoch, turn)`: the latest. Rollouts
                without a key are all kept.

        Raises:
            StoreError: if an index file is damaged.
        """
        table = self._index()
        frame = table.to_pandas()
        frame["labels"] = [json.loads(text) for text in frame["labels"]]
        if unique:
            frame = frame.sort_values("rollout_id", kind="stable")
            keyed = frame["config_hash"].notna()
            frame = frame[~keyed | ~frame.duplicated(_KEY_COLUMNS, keep="last")]
        return frame.reset_index(drop=True)

    def spec(self, shard: str) -> CaptureSpec:
        """Return what a shard's rollouts have in common.

        Raises:
            StoreError: if the shard is missing, damaged or of a newer schema.
        """
        return _open_shard(self.path / shard).spec

    def keys(self) -> list[str]:
        """Return every stored key of the session, in order of first appearance."""
        shards = dict.fromkeys(self._index().column("shard").to_pylist())
        return list(dict.fromkeys(key for shard in shards for key in self.spec(shard).keys))

    def activations(self, key: str, *, where: pd.DataFrame | None = None, positions: str = "all") -> "Activations":
        """Return a lazy sequence of one key's rows, one item per rollout.

        Args:
            key: a stored key, such as "layers.12.resid_post".
            where: rows of `rollouts()` to read, in the order wanted; all of them if None.
            positions: a position policy, applied to what is stored; pooled policies give one row.

        Raises:
            ValueError: if `positions` is not a policy.
        """
        frame = self.rollouts() if where is None else where
        return Activations(self, key, frame, Positions.parse(positions))

    def _index(self) -> pa.Table:
        files = self.index_files()
        for file in files:
            if file.name not in self._tables:
                self._tables[file.name] = read_index(file)
        tables = [self._tables[file.name] for file in files]
        return pa.concat_tables(tables) if tables else INDEX_SCHEMA.empty_table()


def read_index(file: Path) -> pa.Table:
    """Read one index file, its page checksums verified.

    Raises:
        StoreError: if it is damaged or of a newer schema.
    """
    try:
        table = pq.read_table(file, page_checksum_verification=True)
        version = (table.schema.metadata or {}).get(b"roentgen_schema", b"").decode()
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: damaged names are not text
        raise StoreError(f"index file {file} is damaged: {error}") from error
    check_version(version or None, str(file))
    if not table.schema.equals(INDEX_SCHEMA):
        raise StoreError(f"index file {file} is damaged: its columns are not those of schema {version}")
    return table


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
        for index in range(len(self)):
            yield self._read(self.rollouts.iloc[index])

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
        shard = _open_shard(self._session.path / row["shard"])
        if self.key not in shard.spec.keys:
            raise StoreError(
                f"{self.key} was not captured for rollout {row['rollout_id']}; it has {list(shard.spec.keys)}"
            )
        start, stop = int(row["row_start"]), int(row["row_stop"])
        position = shard.rows("position", start, stop).numpy()
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


class Shard:
    """An open shard: memory-mapped, its header checked."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = safe_open(path, framework="pt")
        except FileNotFoundError:
            raise StoreError(f"shard {path} is missing") from None
        except (SafetensorError, OSError) as error:
            raise StoreError(f"shard {path} is damaged: {error}") from error
        self.spec = read_spec(self._file.metadata(), str(path))
        self.names: tuple[str, ...] = tuple(self._file.keys())

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows `[start, stop)` of a tensor; only their pages are read."""
        rows: Tensor = self._file.get_slice(name)[start:stop]
        return rows

    def gather(self, name: str, start: int, rows: Shaped[np.ndarray, "n"]) -> Tensor:
        """Return the given rows, counted from `start`, reading no more than the span they lie in."""
        if len(rows) == 0:
            return self.rows(name, start, start)
        first, last = int(rows[0]), int(rows[-1])
        return self.rows(name, start + first, start + last + 1)[torch.from_numpy(rows - first)]


@lru_cache(maxsize=128)
def _open_shard(path: Path) -> Shard:
    """Open a shard once; shards never change, so a handle stays right. The bound keeps file descriptors few."""
    return Shard(path)
