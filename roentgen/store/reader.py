"""Opens a session and reads it lazily, while writers may continue to append.

`Session.open(uri)` reads only session.json. `rollouts()` reads the index files (each once, since they never change) into a
pandas table with the requested columns or rollouts; `activations(key)` returns a lazy sequence of one key's rows
(`activations`).

Select rollouts with pandas and pass the selection:

    session = Session.open("results/run/activations/my-session")
    right = session.rollouts().query("finish_reason == 'stop'")
    for rollout in session.activations("layers.12.resid_post", where=right, positions="last_prompt"):
        rollout.values            # [rows, d_model]
"""

import json
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import pandas as pd
import pyarrow as pa

from roentgen.contract import LabelValue, Positions
from roentgen.store.activations import Activations
from roentgen.store.index import IndexFile, ShardFile, read_index
from roentgen.store.labels import LabelChanges, label_files, new_labels, overlay_labels, read_label_file, write_labels
from roentgen.store.schema import (
    INDEX_SCHEMA,
    CaptureSpec,
    SessionNotFoundError,
    StoreError,
    check_version,
    read_labels,
)
from roentgen.store.shards import READS_AT_ONCE, Shard
from roentgen.store.storage_backends import StorageFolder, open_folder

_KEY_COLUMNS = ["config_hash", "problem_id", "epoch", "turn"]
LOCATION = ("rollout_id", *_KEY_COLUMNS, "shard", "row_start", "row_stop", "n_prompt", "n_completion")
"""Columns needed to read activations; the others hold texts and lists, which are large for a million rollouts."""
_CACHED_TABLES = 4


class Session:
    """A session of a store, open for reading.

    Attributes:
        folder: the folder that holds it.
        uri: its address.
        name: its id.
    """

    def __init__(self, folder: StorageFolder) -> None:
        self.folder = folder
        self.uri = folder.uri
        self.name = folder.name
        self._tables: OrderedDict[tuple[str, ...], dict[str, IndexFile]] = OrderedDict()
        self._added: dict[str, dict[str, dict[str, LabelValue]]] = {}
        # Shards never change, so an open one stays valid. The cache's bound limits mappings and connections.
        self.shard = lru_cache(maxsize=128)(self._open_shard)

    @classmethod
    def open(cls, uri: str | Path | StorageFolder) -> "Session":
        """Open a session by its address : a reply's `uri`, a path, or a folder of a bucket.

        Raises:
            SessionNotFoundError: if there is no session at the address.
            StoreError: if it has a newer schema or cannot be reached.
        """
        folder = open_folder(uri)
        try:
            identity = json.loads(folder.read("session.json"))
        except (FileNotFoundError, NotADirectoryError):
            raise SessionNotFoundError(f"{folder.uri} is not a session: it has no session.json") from None
        except OSError as error:
            raise StoreError(f"session {folder.uri} cannot be read: {error}") from error
        except ValueError as error:
            raise StoreError(f"{folder.uri}/session.json is not JSON: {error}") from error
        if not isinstance(identity, dict):
            raise StoreError(f"{folder.uri}/session.json is damaged: it is not a JSON object")
        check_version(str(identity.get("schema_version")), folder.uri)
        return cls(folder)

    def rollouts(
        self, *, unique: bool = True, columns: Sequence[str] | None = None, ids: Collection[str] | None = None
    ) -> pd.DataFrame:
        """Read the index: one row per rollout, with `labels` as a dictionary.

        Args:
            unique: True to keep only the latest retry of a rollout, by `(config_hash, problem_id, epoch, turn)`. Rollouts
                without a key are all kept.
            columns: columns to read in addition to `LOCATION`; all if None. A million rollouts' texts take gigabytes.
            ids: read only these rollouts, including retried ones. The index is scanned a few thousand rows at a time and is
                never completely in memory.

        Raises:
            StoreError: if an index file is damaged.
        """
        wanted = None if columns is None else tuple(dict.fromkeys((*LOCATION, *columns)))
        files = self.index(wanted, ids=ids).values()
        table = pa.concat_tables([file.table for file in files]) if files else INDEX_SCHEMA.empty_table()
        # Index files that were merged twice concurrently hold the same rollouts twice.
        frame = table.unify_dictionaries().to_pandas().drop_duplicates("rollout_id", keep="last")
        if "labels" in frame:
            own = [read_labels(text) for text in frame["labels"]]
            frame["labels"] = [*overlay_labels(frame["rollout_id"], own, self._labels_added())]
        if unique and ids is None:
            frame = frame.sort_values("rollout_id", kind="stable")
            keyed = frame["config_hash"].notna()
            frame = frame[~keyed | ~frame.duplicated(_KEY_COLUMNS, keep="last")]
        rollouts: pd.DataFrame = frame.reset_index(drop=True)
        return rollouts

    def index(
        self, columns: Sequence[str] | None = None, *, ids: Collection[str] | None = None
    ) -> dict[str, IndexFile]:
        """Read the index files that are not replaced, in order of name and therefore of time.

        Args:
            columns: columns to read; all if None.
            ids: rollouts to read; all if None.

        Raises:
            StoreError: if one is damaged.
        """
        files = self.every_index(columns, ids=ids)
        replaced = {name for file in files.values() for name in file.replaces}
        return {name: file for name, file in files.items() if name not in replaced}

    def every_index(
        self, columns: Sequence[str] | None = None, *, ids: Collection[str] | None = None
    ) -> dict[str, IndexFile]:
        """Read every index file, including replaced ones.

        Raises:
            StoreError: if one is damaged.
        """
        folder = self.folder.child("index")
        known: dict[str, IndexFile] = {}
        if columns is not None and ids is None:  # cache narrow tables, so that only new files are read the next time
            known = self._tables.setdefault(tuple(columns), known)
            self._tables.move_to_end(tuple(columns))
            while len(self._tables) > _CACHED_TABLES:
                self._tables.popitem(last=False)
        some = None if ids is None else pa.array(list(ids), pa.string())

        def read(name: str) -> IndexFile:
            return read_index(folder, name, columns, ids=some)

        for _ in range(3):
            names = [e.name for e in folder.entries() if e.name.endswith(".parquet") and not e.name.startswith(".")]
            new = [name for name in names if name not in known]
            try:
                if folder.remote and len(new) > 1:
                    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
                        known |= zip(new, pool.map(read, new), strict=True)
                else:
                    for name in new:
                        known[name] = read(name)
            except FileNotFoundError:  # merged and removed since it was listed: list again to find its replacement
                continue
            for name in set(known) - set(names):
                del known[name]
            return {name: known[name] for name in names}
        raise StoreError(f"the index of {self.uri} changes faster than it can be read")

    def add_labels(self, labels: Mapping[str, Mapping[str, LabelValue]]) -> LabelChanges:
        """Add labels to stored rollouts; a new value of an existing label replaces the old one.

        Nothing is written for rollouts that already have the labels, so the call is idempotent.

        Args:
            labels: labels by rollout id.

        Raises:
            StoreError: if the index is damaged, or a value is not allowed in a label.
            OSError: if the disk or the bucket reports an error.
        """
        frame = self.rollouts(columns=("labels",), ids=list(labels))
        stored = dict(zip(frame["rollout_id"], frame["labels"], strict=True))
        new = new_labels(stored, labels)
        if new:
            write_labels(self.folder, new)
        return LabelChanges(len(new), len(stored) - len(new), tuple(one for one in labels if one not in stored))

    def _labels_added(self) -> list[dict[str, dict[str, LabelValue]]]:
        """Read the added label files in the order in which they apply; each once, since they never change."""
        names = label_files(self.folder)
        for name in names:
            if name not in self._added:
                self._added[name] = read_label_file(self.folder, name)
        return [self._added[name] for name in names]

    def shard_files(self) -> dict[str, ShardFile | None]:
        """Return the committed shards by name, with size and checksum (None if no index records them)."""
        found: dict[str, ShardFile | None] = {}
        for file in self.index(LOCATION).values():
            for name in file.named:
                found[name] = file.shards.get(name)
        return found

    def spec(self, shard: str) -> CaptureSpec:
        """Return the capture spec that a shard's rollouts share.

        Raises:
            StoreError: if the shard is missing, damaged or has a newer schema.
        """
        return self.shard(shard).spec

    def keys(self) -> list[str]:
        """Return every stored key of the session, in order of first appearance."""
        return list(dict.fromkeys(key for shard in self.shard_files() for key in self.spec(shard).keys))

    def activations(self, key: str, *, where: pd.DataFrame | None = None, positions: str = "all") -> Activations:
        """Return a lazy sequence of one key's rows, one item per rollout.

        Args:
            key: a stored key, such as "layers.12.resid_post".
            where: rows of `rollouts()` to read, in the desired order; all of them if None.
            positions: a position policy, applied to the stored rows; pooled policies yield one row.

        Raises:
            ValueError: if `positions` is not a position policy.
        """
        frame = self.rollouts(columns=()) if where is None else where
        return Activations(self.shard, self.folder.remote, key, frame, Positions.parse(positions))

    def _open_shard(self, name: str) -> Shard:
        return Shard(self.folder, name)
