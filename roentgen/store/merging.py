"""Makes few large shards of many small ones, and removes what nobody reads any more, while readers read and writers write.

A merged index names the index files that it `replaces`; readers that find both ignore those. Nothing is removed at once: a
reader may hold a table that names the old shards. `collect` removes, after a time of grace, index files that have been
replaced, shards that no index names (a crash between a shard and its index leaves one), and half-written files. All of it may
be interrupted anywhere, and done by several at once: files merged twice hold rollouts twice, which readers count once by id.
"""

import logging
import queue
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
from torch import Tensor
from ulid import ULID

from roentgen.store.index import IndexFile, ShardFile, index_bytes, read_index, write_shard
from roentgen.store.locks import WriterLocks
from roentgen.store.places import Place
from roentgen.store.reader import LOCATION, Session
from roentgen.store.schema import CaptureSpec, Receipt, StoreError, rows_checksum

log = logging.getLogger(__name__)

GRACE_S = 3600.0
"""How long what was replaced, or is named by nobody, is kept: longer than any commit or any reader's table lives."""
MERGED_BYTES = 256 << 20
"""Of a shard that `compact` makes."""


@dataclass(frozen=True)
class Merged:
    """What a merge has done.

    Attributes:
        replaced: index files that no longer count.
        shards: shards that their rollouts were in.
        into: shards that they are in now.
        rollouts: how many there are.
        dropped: rollouts that were left out, as asked.
    """

    replaced: int = 0
    shards: int = 0
    into: int = 0
    rollouts: int = 0
    dropped: int = 0
    index: str | None = None
    size: int = 0


@dataclass(frozen=True)
class Collected:
    """What was removed: the files' names, and their bytes together."""

    files: list[str] = field(default_factory=list)
    size: int = 0


def compact(
    session: Session,
    *,
    shard_bytes: int = MERGED_BYTES,
    keep: Callable[[dict[str, Any]], bool] | None = None,
) -> Merged:
    """Merge a session's small shards, and leave out rollouts that are not wanted.

    Args:
        session: whose.
        shard_bytes: of a merged shard, about; shards of more than half of it stay as they are.
        keep: whether a rollout (its index row, of `LOCATION`) stays; all do if None.

    Raises:
        StoreError: if an index or a shard is damaged: nothing is changed then.
        OSError: as the disk or the bucket answers; nothing is changed then.
    """
    files = session.index(LOCATION)
    sizes = {entry.name: entry.size for entry in session.place.child("shards").entries()}
    chosen = [
        name
        for name, file in files.items()
        if _is_small(file.table, sizes, shard_bytes // 2)
        or (keep is not None and not all(keep(row) for row in file.table.to_pylist()))
    ]
    if len(chosen) < 2 and keep is None:
        return Merged()
    return merge(session, chosen, shard_bytes, keep)


def merge(
    session: Session, names: Sequence[str], shard_bytes: int, keep: Callable[[dict[str, Any]], bool] | None = None
) -> Merged:
    """Merge some index files and their shards into one index file and as many shards as are needed.

    Raises:
        StoreError: if one of them is damaged: nothing is changed then.
        OSError: as the disk or the bucket answers; nothing is changed then.
    """
    if not names:
        return Merged()
    folder = session.place.child("index")
    files = [read_index(folder, name) for name in names]
    rows = {row["rollout_id"]: row for file in files for row in file.table.to_pylist()}
    kept = [row for row in rows.values() if keep is None or keep(row)]
    made: list[ShardFile] = []
    for group in _groups(session, kept, shard_bytes):
        shard = write_shard(session.place, str(ULID()), group.parts(), group.spec)
        start = 0
        for row in group.rows:
            count = row["row_stop"] - row["row_start"]
            row |= {"shard": shard.name, "row_start": start, "row_stop": start + count}
            start += count
        made.append(shard)
    there = {entry.name for entry in folder.entries()}
    replaced = {*names, *(name for file in files for name in file.replaces)} & there
    index = f"{ULID()}.parquet"
    folder.put(index, [index_bytes(kept, made, sorted(replaced))])
    return Merged(
        len(names), len({name for file in files for name in _shards_of(file.table)}), len(made), len(kept),
        len(rows) - len(kept), index, sum(shard.size for shard in made),
    )  # fmt: skip


def collect(session: Session, *, grace_s: float = GRACE_S, dry_run: bool = False) -> Collected:
    """Remove what no reader can want any more; every rollout that counts stays.

    Args:
        session: whose.
        grace_s: leave what is younger than this, in seconds: a commit may be under way, a reader may hold an old table.
        dry_run: only say what would be removed.

    Raises:
        StoreError: if an index file is damaged: what it named is then not known to be garbage, and nothing is removed.
    """
    before = time.time() - grace_s
    index, shards = session.place.child("index"), session.place.child("shards")
    # Shards first: one whose index comes after this listing is not in it, and one that is in it has its index in the next.
    stored = shards.entries()
    entries = {entry.name: entry for entry in index.entries()}
    files = session.every_index(LOCATION)
    dead = {
        name
        for by, file in files.items()
        if by in entries and entries[by].modified <= before
        for name in file.replaces
        if name in files
    }
    named = {PurePosixPath(s).name for name, file in files.items() if name not in dead for s in _shards_of(file.table)}
    gone = [(index, entries[name]) for name in sorted(dead) if name in entries]
    # An index goes before its shards: a crash in between leaves shards that no index names, never the reverse.
    gone += [(shards, entry) for entry in stored if entry.name not in named and entry.modified <= before]
    for folder in (index, session.place):
        gone += [(folder, e) for e in folder.entries() if e.name.startswith(".") and e.modified <= before]
    if not dry_run:
        for folder, entry in gone:
            folder.remove(entry.name)
    size = sum(entry.size for _, entry in gone)
    return Collected([f"{folder.name}/{entry.name}" for folder, entry in gone], size)


class Merger:
    """Merges what one writer wrote in small pieces, on a thread of its own, and later removes what it has replaced."""

    def __init__(self, root: Place, locks: WriterLocks, after: int, small: int, large: int) -> None:
        """Merge for a writer.

        Args:
            root: the store.
            locks: the writer's, held while a session is merged.
            after: merge when a session has so many small shards, or when they are `large` together.
            small: a shard of fewer bytes is small.
            large: bytes of a merged shard.
        """
        self._root, self._locks = root, locks
        self._after, self._small, self._large = after, small, large
        self._waiting: dict[str, dict[str, int]] = defaultdict(dict)
        self._jobs: queue.SimpleQueue[tuple[str, dict[str, int]] | None] = queue.SimpleQueue()
        self._replaced: deque[tuple[float, str, list[IndexFile]]] = deque()
        self._guard = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="store-merger", daemon=True)
        self._thread.start()

    def add(self, receipt: Receipt, size: int) -> None:
        """Hear of a commit: one of its receipts, and the bytes of its activations."""
        self._add(receipt.session_id, f"{PurePosixPath(receipt.shard).stem}.parquet", size)

    def close(self) -> None:
        """Finish the merge that is under way, begin no other, and stop the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _add(self, session_id: str, index: str, size: int) -> None:
        if size >= self._small:
            return
        with self._guard:
            waiting = self._waiting[session_id]
            waiting[index] = size
            if len(waiting) >= self._after or sum(waiting.values()) >= self._large:
                self._jobs.put((session_id, self._waiting.pop(session_id)))

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            session_id, names = job
            self._locks.acquire(session_id)
            try:
                self._locks.settle(session_id)
                self._merge(session_id, sorted(names))
                self._remove_old()
            except (StoreError, OSError):  # nothing is lost: the small shards stay, and `compact` can merge them
                log.exception("the small shards of session %s could not be merged", session_id)
            finally:
                self._locks.release(session_id)

    def _merge(self, session_id: str, names: list[str]) -> None:
        session = Session.open(self._root.child(session_id))
        folder = session.place.child("index")
        there = {entry.name for entry in folder.entries()}
        files = [read_index(folder, name, LOCATION) for name in names if name in there]
        merged = merge(session, [file.name for file in files], self._large)
        if merged.index is not None:
            self._replaced.append((time.monotonic() + GRACE_S, session_id, files))
            self._add(session_id, merged.index, merged.size // max(merged.into, 1))

    def _remove_old(self) -> None:
        while self._replaced and self._replaced[0][0] < time.monotonic():
            _, session_id, files = self._replaced.popleft()
            session = self._root.child(session_id)
            for file in files:
                session.child("index").remove(file.name)
                for shard in _shards_of(file.table):
                    session.child("shards").remove(PurePosixPath(shard).name)


@dataclass(frozen=True)
class _Group:
    """Rollouts that one shard may hold."""

    session: Session
    spec: CaptureSpec
    rows: list[dict[str, Any]]

    def parts(self) -> list[dict[str, Tensor]]:
        """Read the rollouts' tensors, and make sure that they are what was written."""
        if self.session.place.remote:
            with ThreadPoolExecutor(16) as pool:
                return list(pool.map(self._part, self.rows))
        return [self._part(row) for row in self.rows]

    def _part(self, row: dict[str, Any]) -> dict[str, Tensor]:
        shard = self.session.shard(row["shard"])
        part = {name: shard.rows(name, row["row_start"], row["row_stop"]) for name in shard.names}
        if rows_checksum(part) != row["checksum"]:
            raise StoreError(
                f"rollout {row['rollout_id']} in {self.session.uri}/{row['shard']} is damaged: its checksum differs; "
                "nothing was merged"
            )
        return part


def _groups(session: Session, rows: list[dict[str, Any]], shard_bytes: int) -> Iterator[_Group]:
    alike: dict[tuple[CaptureSpec, tuple[object, ...]], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        shard = session.shard(row["shard"])
        alike[shard.spec, shard.layout].append(row)
    for (spec, _), same in alike.items():
        group: list[dict[str, Any]] = []
        size = 0
        for row in same:
            size += (row["row_stop"] - row["row_start"]) * session.shard(row["shard"]).row_bytes
            group.append(row)
            if size >= shard_bytes:
                yield _Group(session, spec, group)
                group, size = [], 0
        if group:
            yield _Group(session, spec, group)


def _is_small(table: pa.Table, sizes: dict[str, int], limit: int) -> bool:
    return all(sizes.get(PurePosixPath(shard).name, 0) < limit for shard in _shards_of(table))


def _shards_of(table: pa.Table) -> list[str]:
    names: list[str] = table.column("shard").unique().to_pylist()
    return names
