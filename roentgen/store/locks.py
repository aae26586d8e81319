"""Prevents the deletion of a session that is being written.

A writer holds a session while rollouts of it wait to be committed; a deleter needs exclusive access, or is rejected. On a
disk this is a kernel lock (`flock`) on `STORE/.<session_id>.lock`, which is released if the process dies. A bucket has no
locks, so both sides write a note and then look for the other's; since buckets are strongly consistent, at least one sees
the other: the writer's is `STORE/.locks/<session_id>/writer-<ulid>`, the deleter's `…/deleting`. A note left by a dead
process expires after `LEASE_S`.
"""

import fcntl
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from ulid import ULID

from roentgen.store.schema import StoreError
from roentgen.store.storage_backends import LocalFolder, StorageFolder

log = logging.getLogger(__name__)

LEASE_S = 600.0
"""Lifetime of a note in a bucket in seconds; its writer renews it at half of this."""


class SessionBusyError(StoreError):
    """The session is being written, so it cannot be deleted."""


class WriterLocks(Protocol):
    """The locks of one writer, counted per session."""

    def acquire(self, session_id: str) -> None:
        """Acquire a session's lock once more."""

    def confirm(self, session_id: str) -> None:
        """Confirm, before writing, that an acquired session is not being deleted; waits while it is."""

    def release(self, session_id: str) -> None:
        """Release a session's lock once."""


def writer_locks(root: StorageFolder) -> WriterLocks:
    """Return the locks of a writer of the store at `root`."""
    return FolderLocks(root.path) if isinstance(root, LocalFolder) else BucketLeases(root)


class FolderLocks:
    """Shared kernel locks on files in the store's folder."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._guard = threading.Lock()
        self._held: dict[str, tuple[int, int]] = {}

    def acquire(self, session_id: str) -> None:
        """Acquire a session's lock once more; waits while the session is being deleted."""
        with self._guard:
            descriptor, count = self._held.get(session_id) or (_open(self._root, session_id), 0)
            if count == 0:
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            self._held[session_id] = descriptor, count + 1

    def confirm(self, session_id: str) -> None:
        """Do nothing: holding the lock is enough."""

    def release(self, session_id: str) -> None:
        """Release a session's lock once."""
        with self._guard:
            descriptor, count = self._held.pop(session_id)
            if count > 1:
                self._held[session_id] = descriptor, count - 1
            else:
                os.close(descriptor)


class BucketLeases:
    """Notes in a bucket. `acquire` only counts, because the engine's thread calls it and must not wait for a network."""

    def __init__(self, root: StorageFolder) -> None:
        self._root = root
        self._name = f"writer-{ULID()}"
        self._guard = threading.Lock()
        self._count: Counter[str] = Counter()
        self._noted: dict[str, float] = {}

    def acquire(self, session_id: str) -> None:
        """Increment a session's count."""
        with self._guard:
            self._count[session_id] += 1

    def confirm(self, session_id: str) -> None:
        """Write or renew the writer's note, and wait while the session is being deleted."""
        folder = _notes(self._root, session_id)
        while time.monotonic() - self._noted.get(session_id, -LEASE_S) > LEASE_S / 2:
            folder.put(self._name, [b""])
            self._noted[session_id] = time.monotonic()
            if not _fresh(folder, "deleting"):
                return
            self._forget(session_id)
            time.sleep(0.5)

    def release(self, session_id: str) -> None:
        """Decrement a session's count, and remove the note with the last."""
        with self._guard:
            self._count[session_id] -= 1
            last = self._count[session_id] == 0
        if last:
            self._forget(session_id)

    def _forget(self, session_id: str) -> None:
        if self._noted.pop(session_id, None) is None:
            return
        try:
            _notes(self._root, session_id).remove(self._name)
        except OSError as error:  # committed data is safe; only a deletion of the session is delayed
            log.warning("session %s cannot be deleted for another %d s: %s", session_id, LEASE_S, error)


@contextmanager
def deleting(root: StorageFolder, session_id: str) -> Iterator[None]:
    """Lock a session for deletion.

    Raises:
        SessionBusyError: if a writer holds it.
    """
    busy = SessionBusyError(f"session {session_id!r} is being written; try again when it is done")
    if not isinstance(root, LocalFolder):
        folder = _notes(root, session_id)
        folder.put("deleting", [b""])
        try:
            if _fresh(folder, "writer-"):
                raise busy
            yield
        finally:
            folder.remove("deleting")
        return
    descriptor = _open(root.path, session_id)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        yield
    finally:
        os.close(descriptor)


def _open(root: Path, session_id: str) -> int:
    return os.open(root / f".{session_id}.lock", os.O_RDWR | os.O_CREAT, 0o644)


def _notes(root: StorageFolder, session_id: str) -> StorageFolder:
    return root.child(".locks").child(session_id)


def _fresh(folder: StorageFolder, prefix: str) -> bool:
    now = time.time()
    return any(entry.name.startswith(prefix) and now - entry.modified < LEASE_S for entry in folder.entries())
