"""How bytes reach a local or mounted folder so that a crash leaves a whole file or none.

Every file is written once, under a temporary name in the same folder, flushed to the disk (`fsync`), renamed
into place, and the folder itself is flushed; only then may anyone be told that it exists. Readers skip names that start
with a dot, which is what the temporary ones do.
"""

import os
import uuid
from collections.abc import Callable
from pathlib import Path


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
