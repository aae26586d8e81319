"""Appends rollouts to sessions with group commits on one thread: shard first, index last.

The engine's thread submits finished rollouts and continues. The writer's thread collects them, writes one shard per
(session, capture spec), then one index file per shard, and only then completes the rollouts' futures. A group shares one
flush of the disk. It is committed when `max_bytes` are pending or the oldest rollout has waited `max_wait_s`; but if no
more rollouts are expected, it is committed at once, since waiting would only delay it. A rollout that requires finite rows
and has others fails alone. There is no manifest: file names are ULIDs, so any number of writers on any number of machines
append concurrently. A crash between the two writes leaves an orphan shard, which readers ignore.

Small groups make small shards. When a writer has made many of them, another thread merges them (`merging`).
"""

import json
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from ulid import ULID

from roentgen.contract import check_session_id
from roentgen.store.index import index_bytes, shard_name, write_shard
from roentgen.store.locks import writer_locks
from roentgen.store.merging import Merger
from roentgen.store.schema import (
    SCHEMA_VERSION,
    CapturedRollout,
    CaptureSpec,
    NonFiniteRowsError,
    Receipt,
    StoreError,
    check_finite,
    index_row,
    index_table,
    rows_checksum,
)
from roentgen.store.storage_backends import StorageFolder, check_writable, open_folder
from roentgen.store.threads import limit_to_one_thread

log = logging.getLogger(__name__)

POLL_S = 0.01
"""Interval in seconds for polling whether more rollouts are expected; rollouts that finish in the same step arrive within
it."""


@dataclass
class _Pending:
    rollout: CapturedRollout
    future: "Future[Receipt]"
    arrived: float


_Outcome = tuple[list[_Pending], list[Receipt] | Exception]
"""Rollouts that were written together, with their receipts or the error."""


class StoreWriter:
    """A group-committing writer for all sessions of one store.

    Use it as a context manager, or call `close`, which commits what is pending.
    """

    def __init__(
        self,
        root: str | Path | StorageFolder,
        *,
        max_bytes: int = 64 << 20,
        max_wait_s: float = 0.25,
        max_pending_bytes: int = 1 << 30,
        merge_shards: int = 64,
        expecting: Callable[[], bool] = lambda: True,
    ) -> None:
        """Open a store for appending.

        Args:
            root: the store's address: a folder, created if absent, or a bucket (`storage_backends`).
            max_bytes: commit as soon as this many bytes are pending.
            max_wait_s: group commit delay: maximum time in seconds that a rollout waits.
            max_pending_bytes: backpressure threshold: there is no room while this many bytes are pending, so that a disk
                slower than the model slows the model instead of filling the memory.
            merge_shards: merge this many small shards of a session into one; 0 disables merging.
            expecting: returns True while more rollouts are being generated; otherwise pending rollouts are committed at once.
                It is called from any thread.

        Raises:
            StoreError: if the store is not writable.
        """
        self.root = open_folder(root)
        check_writable(self.root)
        self._max_bytes = max_bytes
        self._max_wait_s = max_wait_s
        self._max_pending_bytes = max_pending_bytes
        self._expecting = expecting
        self._locks = writer_locks(self.root)
        self._merger = Merger(self.root, self._locks, merge_shards, max_bytes // 4, max_bytes) if merge_shards else None
        self._changed = threading.Condition()
        self._pending: list[_Pending] = []
        self._pending_bytes = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def has_room(self) -> bool:
        """True if a rollout may be submitted without exceeding the limit on pending bytes (a closed writer raises on
        submission)."""
        return self._closed or self._pending_bytes < self._max_pending_bytes

    def wait_for_room(self, timeout_s: float | None = None) -> bool:
        """Wait until there is room.

        Args:
            timeout_s: maximum time to wait in seconds.

        Returns:
            True if there is room.
        """
        with self._changed:
            return self._changed.wait_for(lambda: self.has_room, timeout_s)

    def submit(self, rollout: CapturedRollout) -> "Future[Receipt]":
        """Queue a rollout; the future completes when its index is durable, or fails with the error.

        It never blocks, since the rows are in memory already: producers call `wait_for_room` before they begin.

        Raises:
            StoreError: if the writer is closed.
            ValueError: if the session id is unsafe or a tensor's rows do not match the row columns.
        """
        check_session_id(rollout.session_id)
        for key in rollout.spec.keys:
            if rollout.tensors[key].shape[0] != rollout.n_rows:
                raise ValueError(f"{key} has {rollout.tensors[key].shape[0]} rows; the rollout has {rollout.n_rows}")
        future: Future[Receipt] = Future()
        self._locks.acquire(rollout.session_id)
        with self._changed:
            if self._closed:
                self._locks.release(rollout.session_id)
                raise StoreError("the store's writer is closed")
            self._pending.append(_Pending(rollout, future, time.monotonic()))
            self._pending_bytes += rollout.in_memory
            self._changed.notify_all()
        return future

    def close(self) -> None:
        """Commit what is pending and stop the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        if self._merger is not None:
            self._merger.close()

    def _run(self) -> None:
        limit_to_one_thread()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._pending)
                if not self._pending:
                    return
                sessions = {item.rollout.session_id for item in self._pending}
            self._announce(sessions)
            with self._changed:
                self._wait_for_group(self._pending[0].arrived + self._max_wait_s)
                batch, self._pending = self._pending, []
            for group in _shard_groups(batch):
                self._commit(group)
            with self._changed:
                self._pending_bytes -= sum(item.rollout.in_memory for item in batch)
                self._changed.notify_all()

    def _wait_for_group(self, deadline: float) -> None:
        """Wait, holding the lock, until the pending rollouts are to be committed."""
        while (left := deadline - time.monotonic()) > 0:
            if self._changed.wait_for(
                lambda: self._closed or self._pending_bytes >= self._max_bytes, timeout=min(POLL_S, left)
            ):
                return
            if not self._expecting():
                return

    def _announce(self, sessions: set[str]) -> None:
        """Announce that these sessions are being written, from the first rollout on, so that they are not deleted."""
        for session_id in sessions:
            try:
                self._locks.confirm(session_id)
            except OSError as error:  # the commit will hit the same error and fail the affected rollouts
                log.warning("session %s cannot be announced as being written: %s", session_id, error)

    def _commit(self, group: list[_Pending]) -> None:
        session_id = group[0].rollout.session_id
        group = [item for item in group if self._is_finite(item)]
        if not group:
            return
        outcomes: list[_Outcome]
        try:
            self._locks.confirm(session_id)
            outcomes = list(self._write(group))
        except Exception as error:  # noqa: BLE001 - any error concerns the callers of these rollouts only
            outcomes = [(group, error)]
        finally:
            for _ in group:
                self._locks.release(session_id)
        for items, outcome in outcomes:
            if isinstance(outcome, Exception):
                for item in items:
                    item.future.set_exception(outcome)
                continue
            for item, receipt in zip(items, outcome, strict=True):
                item.future.set_result(receipt)
            if self._merger is not None:
                self._merger.add(outcome[0], sum(item.rollout.size for item in items))

    def _write(self, group: list[_Pending]) -> "Iterator[_Outcome]":
        """Commit rollouts together; if that fails, bisect, so that only the faulty rollout fails."""
        try:
            yield group, commit([item.rollout for item in group], self.root)
        except OSError as error:  # the disk or the bucket failed, which concerns all rollouts
            yield group, error
        except Exception as error:
            if len(group) == 1:
                log.exception("rollout %s cannot be stored", group[0].rollout.rollout_id)
                yield group, error
                return
            middle = len(group) // 2
            yield from self._write(group[:middle])
            yield from self._write(group[middle:])

    def _is_finite(self, item: _Pending) -> bool:
        """Fail a rollout whose rows must be finite and are not; the others of its group continue."""
        try:
            check_finite(item.rollout)
        except NonFiniteRowsError as error:
            self._locks.release(item.rollout.session_id)
            item.future.set_exception(error)
            return False
        return True


def _shard_groups(batch: list[_Pending]) -> list[list[_Pending]]:
    """Split a batch into groups that can share a shard: the same session, spec and shape per key."""
    groups: dict[tuple[str, CaptureSpec, tuple[tuple[int, ...], ...]], list[_Pending]] = defaultdict(list)
    for item in batch:
        rollout = item.rollout
        shapes = tuple(tuple(rollout.tensors[key].shape[1:]) for key in rollout.spec.keys)
        groups[rollout.session_id, rollout.spec, shapes].append(item)
    return list(groups.values())


def commit(rollouts: Sequence[CapturedRollout], root: StorageFolder) -> list[Receipt]:
    """Write one shard and its index for rollouts of one session and spec; they are durable when it returns.

    Raises:
        UnstorableError: if one of them does not fit the index's columns; nothing has been written then.
        OSError: if the disk or the bucket reports an error; nothing is then visible to readers.
    """
    session = root.child(rollouts[0].session_id)
    name = str(ULID())
    parts = [rollout.all_tensors() for rollout in rollouts]
    created = datetime.now(UTC)
    receipts, rows, start = [], [], 0
    for rollout, part in zip(rollouts, parts, strict=True):
        stop = start + rollout.n_rows
        receipt = Receipt(session.name, rollout.rollout_id, session.uri, shard_name(name), start, stop)
        receipts.append(receipt)
        rows.append(index_row(rollout, receipt, created, rows_checksum(part)))
        start = stop
    table = index_table(rows)

    _make_session(session)
    shard = write_shard(session, name, parts, rollouts[0].spec)
    session.child("index").put(f"{name}.parquet", [index_bytes(table, [shard])])
    return receipts


def _make_session(session: StorageFolder) -> None:
    """Create `session.json` if absent."""
    if not any(entry.name == "session.json" for entry in session.entries()):
        body = {"name": session.name, "schema_version": SCHEMA_VERSION, "created": datetime.now(UTC).isoformat()}
        session.put("session.json", [(json.dumps(body, indent=2) + "\n").encode()])
