"""Appends rollouts to sessions: one thread, commits in groups, shard first and index last.

The engine's thread hands over finished rollouts and goes on; this thread gathers what arrives, writes one shard per
(session, capture spec), then one index file per shard, and only then completes the rollouts' futures. Grouping makes one
fsync serve many rollouts; it waits until `max_bytes` are pending or the oldest has waited `max_wait_s`. There is no manifest
and no lock: file names are ULIDs, so any number of writers on any number of machines append side by side. A crash between
the two writes leaves an orphan shard, which readers never see.
"""

import json
import threading
import time
from collections import defaultdict
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from ulid import ULID

from roentgen.contract import check_session_id
from roentgen.store.durable import check_writable, local_root, make_folder, write_durably
from roentgen.store.locks import WriterLocks
from roentgen.store.schema import (
    INDEX_SCHEMA,
    SCHEMA_VERSION,
    CaptureSpec,
    Receipt,
    Rollout,
    StoreError,
    index_row,
    rows_checksum,
    spec_metadata,
)


@dataclass
class _Pending:
    rollout: Rollout
    future: "Future[Receipt]"
    arrived: float


class StoreWriter:
    """A group-committing writer for every session of one store.

    Use it as a context manager, or call `close`, which commits what is pending.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        max_bytes: int = 64 << 20,
        max_wait_s: float = 0.25,
        max_pending_bytes: int = 1 << 30,
    ) -> None:
        """Open a store for appending.

        Args:
            root: the store's folder; made if absent.
            max_bytes: commit at once when this much is pending.
            max_wait_s: commit at the latest when a rollout has waited this long, in seconds.
            max_pending_bytes: `submit` blocks while more than this is pending, so that a disk slower than the model slows
                the model instead of filling the memory.

        Raises:
            StoreError: if the folder is not writable.
        """
        self.root = local_root(root)
        check_writable(self.root)
        self._max_bytes = max_bytes
        self._max_wait_s = max_wait_s
        self._max_pending_bytes = max_pending_bytes
        self._locks = WriterLocks(self.root)
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

    def submit(self, rollout: Rollout) -> "Future[Receipt]":
        """Queue a rollout; the future completes when its index is durable, or fails with the disk's error.

        Blocks while too much is pending.

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
            self._changed.wait_for(lambda: self._closed or self._pending_bytes <= self._max_pending_bytes)
            if self._closed:
                self._locks.release(rollout.session_id)
                raise StoreError("the store's writer is closed")
            self._pending.append(_Pending(rollout, future, time.monotonic()))
            self._pending_bytes += rollout.nbytes
            self._changed.notify_all()
        return future

    def close(self) -> None:
        """Commit what is pending and stop the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._pending)
                if not self._pending:
                    return
                deadline = self._pending[0].arrived + self._max_wait_s
                self._changed.wait_for(
                    lambda: self._closed or self._pending_bytes >= self._max_bytes,
                    timeout=max(0.0, deadline - time.monotonic()),
                )
                group, self._pending = self._pending, []
            for bucket in _buckets(group):
                self._commit(bucket)
            with self._changed:
                self._pending_bytes -= sum(item.rollout.nbytes for item in group)
                self._changed.notify_all()

    def _commit(self, bucket: list[_Pending]) -> None:
        try:
            receipts = commit([item.rollout for item in bucket], self.root)
        except Exception as error:  # noqa: BLE001 - whatever went wrong belongs to these rollouts' callers, and only to them
            for item in bucket:
                self._locks.release(item.rollout.session_id)
                item.future.set_exception(error)
            return
        for item in bucket:
            self._locks.release(item.rollout.session_id)
        for item, receipt in zip(bucket, receipts, strict=True):
            item.future.set_result(receipt)


def _buckets(group: list[_Pending]) -> list[list[_Pending]]:
    """Split a group by what one shard may hold: one session, one spec, one shape per key."""
    buckets: dict[tuple[str, CaptureSpec, tuple[tuple[int, ...], ...]], list[_Pending]] = defaultdict(list)
    for item in group:
        rollout = item.rollout
        shapes = tuple(tuple(rollout.tensors[key].shape[1:]) for key in rollout.spec.keys)
        buckets[rollout.session_id, rollout.spec, shapes].append(item)
    return list(buckets.values())


def commit(rollouts: list[Rollout], root: Path) -> list[Receipt]:
    """Write one shard and its index for rollouts of one session and spec; durable when it returns.

    Raises:
        OSError: as the disk answers; nothing is then visible to readers.
    """
    session_id, spec = rollouts[0].session_id, rollouts[0].spec
    folder = root / session_id
    _make_session(folder, session_id)
    name = str(ULID())
    shard = f"shards/{name}.safetensors"

    parts = [rollout.all_tensors() for rollout in rollouts]
    tensors = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    write_durably(folder / shard, lambda path: save_file(tensors, path, metadata=spec_metadata(spec)))

    created = datetime.now(UTC)
    receipts, rows, start = [], [], 0
    for rollout, part in zip(rollouts, parts, strict=True):
        stop = start + rollout.n_rows
        receipt = Receipt(session_id, rollout.rollout_id, str(folder), shard, start, stop)
        receipts.append(receipt)
        rows.append(index_row(rollout, receipt, created, rows_checksum(part)))
        start = stop
    table = pa.Table.from_pylist(rows, schema=INDEX_SCHEMA)
    write_durably(folder / f"index/{name}.parquet", lambda path: pq.write_table(table, path, write_page_checksum=True))
    return receipts


def _make_session(folder: Path, session_id: str) -> None:
    """Create a session's folders and identity, if they are not there."""
    make_folder(folder / "shards")
    make_folder(folder / "index")
    identity = folder / "session.json"
    if not identity.exists():
        body = {"name": session_id, "schema_version": SCHEMA_VERSION, "created": datetime.now(UTC).isoformat()}
        write_durably(identity, lambda path: path.write_text(json.dumps(body, indent=2) + "\n"))
