"""How bytes reach a local or mounted folder so that a crash leaves a whole file or none.

Every file is written once, under a temporary name in the same folder, flushed to the disk (`fsync`), renamed
into place, and the folder itself is flushed; only then may anyone be told that it exists. Readers skip names that start
with a dot, which is what the temporary ones do.

What is large goes past the kernel's page cache. Through it, every byte is copied once more, on cores that the model computes
with, and takes memory from what others read: 512 MB cost 0.1 s of a core where the cache had free pages at hand and 1.3 s
where it had not; straight from a buffer they cost 0.02 s, and the disk is as fast.
"""

import errno
import fcntl
import mmap
import os
import uuid
from collections.abc import Callable, Iterable
from io import FileIO
from pathlib import Path

BUFFER_BYTES = 8 << 20
"""What is written at once past the page cache; a file that does not fill it goes through the cache."""
_ALIGNED = 4096
"""What lengths and places must be multiples of, past the page cache."""
_DIRECT = getattr(os, "O_DIRECT", 0)  # macOS has none


def write_durably(path: Path, write: Callable[[Path], object]) -> None:
    """Create `path` with what `write` puts into the temporary file it is given; whole or not at all.

    Raises:
        OSError: as the disk answers (full, read-only); the temporary file is removed first.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_chunks(path: Path, chunks: Iterable[bytes | bytearray | memoryview]) -> None:
    """Write a file's bytes, past the page cache if there are many and the file system can.

    Raises:
        OSError: as the disk answers.
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
            # The end is written with what else is in its last block, and cut off behind it.
            _write(file, buffer, filled + -filled % _ALIGNED if written else filled)
            file.truncate(written + filled)


def _write(file: FileIO, buffer: mmap.mmap, length: int) -> None:
    """Write the beginning of a buffer, all of it."""
    with memoryview(buffer) as whole:
        done = 0
        while done < length:
            try:
                done += file.write(whole[done:length]) or 0
            except OSError as error:
                if error.errno != errno.EINVAL or not _pass_cache(file, False):
                    raise


def _pass_cache(file: FileIO, wanted: bool) -> bool:
    """Have a file's writes go past the page cache, or not; returns whether that has changed."""
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    changed = flags | _DIRECT if wanted else flags & ~_DIRECT
    if changed == flags:
        return False
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, changed)
    except OSError as error:
        if error.errno != errno.EINVAL:  # this file system cannot
            raise
        return False
    return True


def make_folder(path: Path) -> None:
    """Create a folder and its parents, each durable in its own parent."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
