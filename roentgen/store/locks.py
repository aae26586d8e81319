"""Keeps a session from being deleted while it is written.

A writer holds a shared lock on `STORE/.<session_id>.lock` for as long as rollouts of the session are waiting to be committed;
whoever deletes the session takes it exclusively, or is refused. The kernel gives locks back when a process dies, so a crash
leaves none behind. The file lies beside the session, not in it, and stays when the session goes.
"""

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from roentgen.store.schema import StoreError


class SessionBusyError(StoreError):
    """A session is being written, so it cannot be deleted now."""


class WriterLocks:
    """The shared locks of one writer, counted per session."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._guard = threading.Lock()
        self._held: dict[str, tuple[int, int]] = {}

    def acquire(self, session_id: str) -> None:
        """Hold a session's lock once more; waits while the session is being deleted."""
        with self._guard:
            descriptor, count = self._held.get(session_id) or (_open(self._root, session_id), 0)
            if count == 0:
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            self._held[session_id] = descriptor, count + 1

    def release(self, session_id: str) -> None:
        """Hold a session's lock once less."""
        with self._guard:
            descriptor, count = self._held.pop(session_id)
            if count > 1:
                self._held[session_id] = descriptor, count - 1
            else:
                os.close(descriptor)


@contextmanager
def deleting(root: Path, session_id: str) -> Iterator[None]:
    """Keep writers away from a session.

    Raises:
        SessionBusyError: if one is writing it.
    """
    descriptor = _open(root, session_id)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SessionBusyError(f"session {session_id!r} is being written; try again when it is done") from None
        yield
    finally:
        os.close(descriptor)


def _open(root: Path, session_id: str) -> int:
    return os.open(root / f".{session_id}.lock", os.O_RDWR | os.O_CREAT, 0o644)
