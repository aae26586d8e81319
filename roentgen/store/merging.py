"""Merges small shards into large ones and removes unused files, while readers read and writers write.

    before          index A ──names──▶ shard a        index B ──names──▶ shard b
    merge           index C ──names──▶ shard c (rows of a and b)      C replaces A, B
    readers         ignore A and B as soon as they see C
    remove_unused   after the grace period: A and B, then a and b, which no index names

A reader may still hold a table that names the old shards, so nothing is removed at once. After a grace period,
`remove_unused` deletes replaced index files, shards that no index names (a crash between a shard and its index leaves one),
and partial files. Merging may be interrupted anywhere and run concurrently: index files that are merged twice hold their
rollouts twice, and readers count a rollout once by its id.
"""

import logging
import queue
import threading
import time
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor
from ulid import ULID

from roentgen.store.index import ShardFile, index_bytes, read_index, write_shard
from roentgen.store.locks import WriterLocks
from roentgen.store.reader import LOCATION, Session
from roentgen.store.schema import INDEX_SCHEMA, CaptureSpec, Receipt, StoreError, rows_checksum
from roentgen.store.storage_backends import FileEntry, StorageFolder
from roentgen.store.threads import limit_to_one_thread

log = logging.getLogger(__name__)

GRACE_S = 3600.0
"""Grace period in seconds for replaced and unreferenced files: longer than any commit takes or any reader holds a table."""
MERGED_BYTES = 256 << 20
"""Target size of a merged shard."""
INDEX_BYTES = 8 << 20
"""Total size of index files merged at once: tens of thousands of rollouts, whose texts are in memory meanwhile."""
_MOVED_BY = [*LOCATION, "checksum"]


@dataclass(frozen=True)
class MergeResult:
    """The result of a merge."""

    replaced: int = 0
    """Number of index files that were replaced."""
    indexes: tuple[str, ...] = ()
    """The index files that replace them."""
    moved: tuple[str, ...] = ()
    """Shards whose rollouts were moved."""
    into: tuple[ShardFile, ...] = ()
    """Shards that hold them now."""
    rollouts: int = 0
    """Number of rollouts in the new index files."""
    dropped: int = 0
    """Number of rollouts dropped on request."""

    def __add__(self, other: "MergeResult") -> "MergeResult":
        return MergeResult(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass(frozen=True)
class RemovedFiles:
    """Removed files: their names and total bytes."""

    files: list[str] = field(default_factory=list)
    size: int = 0


def compact(session: Session, *, shard_bytes: int = MERGED_BYTES, drop: Collection[str] = ()) -> MergeResult:
    """Merge a session's small shards and small index files, and drop unwanted rollouts.

    Args:
        session: the session.
        shard_bytes: approximate size of a merged shard; shards larger than half of it are kept.
        drop: ids of rollouts to drop.

    Raises:
        StoreError: if an index or a shard is damaged; what had not been merged by then is unchanged.
        OSError: if the disk or the bucket reports an error; likewise.
    """
    files, unwanted, small = session.index(LOCATION), pa.array(list(drop), pa.string()), shard_bytes // 2

    def needs_merge(entry: FileEntry) -> bool:
        if (file := files.get(entry.name)) is None:
            return False
        affected = pc.any(pc.is_in(file.table.column("rollout_id"), value_set=unwanted)).as_py()
        return affected or entry.size < INDEX_BYTES // 2 or any(s.size < small for s in file.shards.values())

    done = MergeResult()
    for names in _batches(filter(needs_merge, session.folder.child("index").entries())):
        done += merge(session, names, shard_bytes=shard_bytes, small=small, drop=drop)
    return done


def _batches(entries: Iterable[FileEntry]) -> Iterator[list[str]]:
    """Split index files into batches that are merged at once, so that memory stays bounded."""
    batch, size = list[str](), 0
    for entry in entries:
        if batch and size + entry.size > INDEX_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(entry.name)
        size += entry.size
    if batch:
        yield batch


def merge(
    session: Session, names: Sequence[str], *, shard_bytes: int, small: int, drop: Collection[str] = ()
) -> MergeResult:
    """Merge several index files into one, and their small shards into large ones.

    The steps are: read the index rows; choose the shards to move (small, unknown, or with dropped rollouts); write the rows
    of these shards into new ones; write one index with the new locations, which replaces the old ones. A single index file
    that would be rewritten unchanged is left alone.

    Args:
        session: the session.
        names: names of the index files.
        shard_bytes: approximate size of a merged shard.
        small: shards of at least this size are kept, unless one of their rollouts is dropped.
        drop: ids of rollouts to drop.

    Raises:
        StoreError: if one of them is damaged; nothing is changed then.
        OSError: if the disk or the bucket reports an error; nothing is changed then.
    """
    folder, unwanted = session.folder.child("index"), frozenset(drop)
    files = [read_index(folder, name) for name in names]
    if not files:
        return MergeResult()
    table = pa.concat_tables([file.table for file in files]).unify_dictionaries()
    # By id, because files that were merged twice hold rollouts twice.
    rows = {row["rollout_id"]: row | {"at": at} for at, row in enumerate(table.select(_MOVED_BY).to_pylist())}
    kept = [row for rollout_id, row in rows.items() if rollout_id not in unwanted]
    affected = {row["shard"] for rollout_id, row in rows.items() if rollout_id in unwanted}
    known = {shard.name: shard for file in files for shard in file.shards.values()}
    named = {row["shard"] for row in rows.values()}
    moving = {n for n in named if n in affected or n not in known or known[n].size < small}
    if len(files) == 1 and len(moving) < 2 and not affected:
        return MergeResult()

    made: list[ShardFile] = []
    for group in _merge_groups(session, [row for row in kept if row["shard"] in moving], shard_bytes):
        shard = write_shard(session.folder, str(ULID()), group.parts(), group.spec)
        start = 0
        for row in group.rows:
            count = row["row_stop"] - row["row_start"]
            row |= {"shard": shard.name, "row_start": start, "row_stop": start + count}
            start += count
        made.append(shard)

    table = table.take(pa.array([row["at"] for row in kept], pa.int64()))
    for name in ("shard", "row_start", "row_stop"):
        column = pa.array([row[name] for row in kept], INDEX_SCHEMA.field(name).type)
        table = table.set_column(table.column_names.index(name), name, column)
    staying = [known[name] for name in sorted({row["shard"] for row in kept} & known.keys())]
    there = {entry.name for entry in folder.entries()}
    replaced = {*names, *(name for file in files for name in file.replaces)} & there
    index = f"{ULID()}.parquet"
    folder.put(index, [index_bytes(table, [*staying, *made], sorted(replaced))])
    return MergeResult(len(names), (index,), tuple(sorted(moving)), tuple(made), len(kept), len(rows) - len(kept))


def remove_unused(session: Session, *, grace_s: float = GRACE_S, dry_run: bool = False) -> RemovedFiles:
    """Remove files that no reader can use any more; all committed rollouts are kept.

    Args:
        session: the session.
        grace_s: keep files younger than this, in seconds: a commit may be in progress, or a reader may hold an old table.
        dry_run: only report what would be removed.

    Raises:
        StoreError: if an index file is damaged: the shards it names are then unknown, so nothing is removed.
    """
    before = time.time() - grace_s
    index, shards = session.folder.child("index"), session.folder.child("shards")
    # List shards before indexes: then the index of every listed shard is either listed too, or the shard is unreferenced.
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
    named = {PurePosixPath(s).name for name, file in files.items() if name not in dead for s in file.named}
    gone = [(index, entries[name]) for name in sorted(dead) if name in entries]
    # Remove an index before its shards: a crash in between leaves unreferenced shards, never an index without its shards.
    gone += [(shards, entry) for entry in stored if entry.name not in named and entry.modified <= before]
    for folder in (index, session.folder.child("labels"), session.folder):
        gone += [(folder, e) for e in folder.entries() if e.name.startswith(".") and e.modified <= before]
    if not dry_run:
        for folder, entry in gone:
            folder.remove(entry.name)
    size = sum(entry.size for _, entry in gone)
    return RemovedFiles([f"{folder.name}/{entry.name}" for folder, entry in gone], size)


class Merger:
    """Merges the small shards of one writer on a background thread, and later removes the replaced files."""

    def __init__(self, root: StorageFolder, locks: WriterLocks, after: int, small: int, large: int) -> None:
        """Start the thread.

        Args:
            root: the store.
            locks: the writer's locks, held while a session is merged.
            after: merge when a session has this many small shards, or when their total size reaches `large`.
            small: shards smaller than this, in bytes, are small.
            large: size of a merged shard in bytes.
        """
        self._root, self._locks = root, locks
        self._after, self._small, self._large = after, small, large
        self._waiting: dict[tuple[str, bool], dict[str, int]] = defaultdict(dict)
        self._jobs: queue.SimpleQueue[tuple[str, dict[str, int]] | None] = queue.SimpleQueue()
        self._replaced: deque[tuple[float, str, list[str], tuple[str, ...]]] = deque()
        self._guard = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="store-merger", daemon=True)
        self._thread.start()

    def add(self, receipt: Receipt, size: int) -> None:
        """Record a commit: one of its receipts, and its bytes of activations and index."""
        self._add(receipt.session_id, f"{PurePosixPath(receipt.shard).stem}.parquet", size)

    def close(self) -> None:
        """Finish the current merge, start no other, and stop the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _add(self, session_id: str, index: str, size: int) -> None:
        small = size < self._small
        with self._guard:
            waiting = self._waiting[session_id, small]
            waiting[index] = size
            if len(waiting) >= self._after or (small and sum(waiting.values()) >= self._large):
                self._jobs.put((session_id, self._waiting.pop((session_id, small))))

    def _run(self) -> None:
        limit_to_one_thread()
        while (job := self._jobs.get()) is not None:
            session_id, sizes = job
            self._locks.acquire(session_id)
            try:
                self._locks.confirm(session_id)
                self._merge(session_id, sizes)
                self._remove_old()
            except Exception:  # the small shards remain, and `compact` can merge them later
                log.exception("the small shards of session %s could not be merged", session_id)
            finally:
                self._locks.release(session_id)

    def _merge(self, session_id: str, sizes: dict[str, int]) -> None:
        session = Session.open(self._root.child(session_id))
        there = [entry for entry in session.folder.child("index").entries() if entry.name in sizes]
        for names in _batches(there):
            merged = merge(session, names, shard_bytes=self._large, small=self._small)
            for index in merged.indexes:
                self._replaced.append((time.monotonic() + GRACE_S, session_id, names, merged.moved))
                if merged.into:
                    self._add(session_id, index, sum(sizes[name] for name in names) // len(merged.into))

    def _remove_old(self) -> None:
        while self._replaced and self._replaced[0][0] < time.monotonic():
            _, session_id, indexes, shards = self._replaced.popleft()
            session = self._root.child(session_id)
            for name in indexes:
                session.child("index").remove(name)
            for name in shards:
                session.child("shards").remove(PurePosixPath(name).name)


@dataclass(frozen=True)
class _MergeGroup:
    """Rollouts that can share a shard."""

    session: Session
    spec: CaptureSpec
    rows: list[dict[str, Any]]

    def parts(self) -> list[dict[str, Tensor]]:
        """Read the rollouts' tensors and verify their checksums."""
        if self.session.folder.remote:
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


def _merge_groups(session: Session, rows: list[dict[str, Any]], shard_bytes: int) -> Iterator[_MergeGroup]:
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
                yield _MergeGroup(session, spec, group)
                group, size = [], 0
        if group:
            yield _MergeGroup(session, spec, group)
