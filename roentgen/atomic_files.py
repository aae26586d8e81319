"""Atomic, fsynced writes: after a crash, a file on a local or mounted disk is either the old or the new version, complete.

The bytes are written under a temporary name in the same folder, flushed to disk (`fsync`), and renamed into place; then the
folder itself is flushed. Only then may the file's existence be reported. Temporary names begin with a dot; readers skip
them. The store, the runs and the probes write all files this way.

Large files bypass the kernel's page cache (O_DIRECT). Through the cache every byte is copied once more, on cores that the
model uses, and displaces pages that others read: 512 MB cost 0.1 s of a core with free cache pages and 1.3 s without;
written directly from a buffer they cost 0.02 s, at the same disk speed.
"""

import errno
import fcntl
import json
import mmap
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

BUFFER_BYTES = 8 << 20
"""Size of a direct write; smaller files go through the page cache."""
_ALIGNED = 4096
"""Alignment of lengths and offsets of direct writes."""
_DIRECT = getattr(os, "O_DIRECT", 0)  # macOS has none


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, which then replaces `path`; on error it is removed and `path` is unchanged.

    Raises:
        OSError: if the disk is full or read-only.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException:  # Ctrl-C can arrive at any moment
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write a text file atomically in UTF-8; `errors` is that of `str.encode`."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=errors)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, indented for human readers."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_chunks(path: Path, chunks: Iterable[bytes | bytearray | memoryview]) -> None:
    """Write a file's bytes, bypassing the page cache for large files if the file system supports it.

    Raises:
        OSError: if the disk reports an error.
    """
    with path.open("wb", buffering=0) as file, mmap.mmap(-1, BUFFER_BYTES) as buffer:
        filled = written = 0
        for chunk in chunks:
            for start in range(0, len(chunk), BUFFER_BYTES):
                piece = memoryview(chunk)[start : start + BUFFER_BYTES]
                head = min(len(piece), BUFFER_BYTES - filled)
                buffer[filled : filled + head] = piece[:head]
                filled += head
                if filled == BUFFER_BYTES:
                    _pass_cache(file, True)
                    _write(file, buffer, filled)
                    written += filled
                    filled = len(piece) - head
                    buffer[:filled] = piece[head:]
        if filled:
            # The last block is written in full and truncated afterwards.
            _write(file, buffer, filled + -filled % _ALIGNED if written else filled)
            file.truncate(written + filled)


def _write(file: FileIO, buffer: mmap.mmap, length: int) -> None:
    """Write the beginning of a buffer completely."""
    with memoryview(buffer) as whole:
        done = 0
        while done < length:
            try:
                done += file.write(whole[done:length]) or 0
            except OSError as error:
                if error.errno != errno.EINVAL or not _pass_cache(file, False):
                    raise


def _pass_cache(file: FileIO, wanted: bool) -> bool:
    """Enable or disable direct I/O for a file; return True if that changed the mode."""
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    changed = flags | _DIRECT if wanted else flags & ~_DIRECT
    if changed == flags:
        return False
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, changed)
    except OSError as error:
        if error.errno != errno.EINVAL:  # not supported by the file system
            raise
        return False
    return True


def make_folder(path: Path) -> None:
    """Create a folder and its parents durably."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill, which then becomes `path`; on error it is removed and `path` is unchanged.

    Args:
        path: the folder; it must not exist, or be empty.

    Raises:
        OSError: if the disk is full or read-only, or `path` holds something.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for file in [*temporary.rglob("*"), temporary]:
            sync_folder(file)
        os.rename(temporary, path)
    except BaseException:  # Ctrl-C can arrive at any moment
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Flush a folder's entries, or a file, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
