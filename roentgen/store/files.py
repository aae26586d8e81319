"""Lists, reads and archives the files of a session, for `pull`, the server's routes and its tar archive.

Files never change. The listing contains only committed files, and lists a file after the files that it refers to, so a copy
made in this order is consistent at any point.
"""

import re
import tarfile
from collections.abc import Iterator

from roentgen.store.labels import FOLDER as LABELS
from roentgen.store.labels import label_files
from roentgen.store.reader import LOCATION, Session
from roentgen.store.storage_backends import Bytes, FileEntry

_NAME = re.compile(r"session\.json|shards/[0-9A-Z]{26}\.safetensors|(index|labels)/[0-9A-Z]{26}\.parquet")
_BLOCK = tarfile.BLOCKSIZE


def is_session_file(name: str) -> bool:
    """True if a path can be that of a session's file."""
    return _NAME.fullmatch(name) is not None


def session_files(session: Session) -> list[FileEntry]:
    """Return the committed files by their paths inside the session: the identity, shards, indexes and added labels."""
    live = session.index(LOCATION)
    named = {shard for file in live.values() for shard in file.named} | {f"index/{name}" for name in live}
    inside = [
        FileEntry(f"{folder}/{entry.name}", entry.size, entry.modified)
        for folder in ("shards", "index")
        for entry in session.folder.child(folder).entries()
    ]
    identity = [entry for entry in session.folder.entries() if entry.name == "session.json"]
    added = set(label_files(session.folder))
    labels = [
        FileEntry(f"{LABELS}/{entry.name}", entry.size, entry.modified)
        for entry in session.folder.child(LABELS).entries()
        if entry.name in added
    ]
    return [*identity, *(entry for entry in inside if entry.name in named), *labels]


def read_file(session: Session, name: str) -> tuple[int, Iterator[Bytes]]:
    """Return the size of a session's file and an iterator over its bytes, a few megabytes at a time.

    Raises:
        FileNotFoundError: if the session has no such file.
        OSError: if the disk or the bucket reports an error.
    """
    if not is_session_file(name):
        raise FileNotFoundError(f"{name!r} is not a file of a session")
    folder, _, file = name.rpartition("/")
    return (session.folder.child(folder) if folder else session.folder).stream(file)


def tar_session(session: Session) -> tuple[int, Iterator[bytes]]:
    """Return a session as a tar archive, size and bytes: a snapshot of the committed files, even while more are being
    written."""
    entries = session_files(session)

    def pieces() -> Iterator[bytes]:
        for entry in entries:
            header = tarfile.TarInfo(f"{session.name}/{entry.name}")
            header.size, header.mtime = entry.size, int(entry.modified)
            yield header.tobuf(tarfile.USTAR_FORMAT)
            yield from map(bytes, read_file(session, entry.name)[1])
            yield bytes(-entry.size % _BLOCK)
        yield bytes(2 * _BLOCK)

    return sum(_BLOCK + entry.size + -entry.size % _BLOCK for entry in entries) + 2 * _BLOCK, pieces()
