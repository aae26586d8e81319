"""Where a store is: a folder of a disk, or of a bucket; both answer to the same few verbs.

Files are written once, whole or not at all, and never changed, so a place only has to create, list, read and remove them.
On a disk that is an atomic, fsynced write (`roentgen.atomic_files`), and reading maps the file into
memory. In a bucket it is one object, which no one can see before its last byte is there, and reading asks for ranges.

    s3://bucket/folder      credentials and region as AWS's own tools find them; AWS_ENDPOINT_URL names another S3 server
    gs://…, abfss://…       likewise, as pyarrow's documentation says
    anything else           a folder of this machine, or one mounted here
"""

import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self
from urllib.parse import urlsplit

import pyarrow as pa
from ulid import ULID

from roentgen.atomic_files import atomic_write, make_folder, sync_folder, write_chunks
from roentgen.store.schema import StoreError

BUCKETS = ("s3", "gs", "gcs", "abfs", "abfss")
_PIECE = 4 << 20
Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Entry:
    """A file of a folder: its name, its size in bytes, and when it was last written, in seconds since 1970."""

    name: str
    size: int
    modified: float


class Readable(Protocol):
    """An open file that is read in any order."""

    size: int
    """Size in bytes."""
    gap: int
    """The most bytes between two ranges that one request reads along, because a second request would cost more."""

    def expect(self, offset: int, length: int) -> None:
        """Begin to fetch what will be looked at soon, if that can go on by itself."""

    def read(self, offset: int, length: int) -> bytearray | memoryview:
        """Return `length` bytes from `offset`, which whoever asked may write over."""


class Place(ABC):
    """A folder.

    Attributes:
        uri: its address, absolute; `open_place` understands it.
    """

    remote: bool
    """Whether reading waits for a network, so that several reads at once are faster than one after the other."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def __str__(self) -> str:
        return self.uri

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.uri.rstrip("/").rsplit("/", 1)[-1]

    @abstractmethod
    def child(self, name: str) -> Self:
        """Return a folder inside, which need not exist."""

    @abstractmethod
    def put(self, name: str, chunks: Iterable[Bytes]) -> None:
        """Create a file from its bytes, whole or not at all; durable when this returns.

        Raises:
            OSError: as the disk or the bucket answers.
        """

    @abstractmethod
    def entries(self) -> list[Entry]:
        """List the files directly in this folder, in order of name; none if it does not exist."""

    @abstractmethod
    def folders(self) -> list[str]:
        """List the names of the folders directly in this one, in order."""

    @abstractmethod
    def open(self, name: str) -> Readable:
        """Open a file for reading.

        Raises:
            FileNotFoundError: if it is not there.
            OSError: as the disk or the bucket answers.
        """

    @abstractmethod
    def open_arrow(self, name: str) -> pa.NativeFile:
        """Open a file as pyarrow reads files.

        Raises:
            FileNotFoundError: if it is not there.
            OSError: as the disk or the bucket answers.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file; it need not exist."""

    def read(self, name: str) -> bytes:
        """Return a file's bytes.

        Raises:
            FileNotFoundError: if it is not there.
        """
        file = self.open(name)
        return bytes(file.read(0, file.size))

    def stream(self, name: str) -> tuple[int, Iterator[Bytes]]:
        """Return a file's size and its bytes, a few megabytes at a time.

        Raises:
            FileNotFoundError: if it is not there.
        """
        file = self.open(name)
        return file.size, (file.read(offset, min(_PIECE, file.size - offset)) for offset in range(0, file.size, _PIECE))


class FolderPlace(Place):
    """A folder of this machine's disks, or one that is mounted here."""

    remote = False

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path

    def child(self, name: str) -> Self:  # noqa: D102 - as Place's
        return type(self)(self.path / name)

    def put(self, name: str, chunks: Iterable[Bytes]) -> None:  # noqa: D102
        make_folder(self.path)
        with atomic_write(self.path / name) as temporary:
            write_chunks(temporary, chunks)

    def entries(self) -> list[Entry]:  # noqa: D102
        found = []
        try:
            with os.scandir(self.path) as scan:
                for entry in scan:
                    if entry.is_file():
                        found.append(_entry(entry))
        except FileNotFoundError:
            return []
        return sorted((entry for entry in found if entry), key=lambda entry: entry.name)

    def folders(self) -> list[str]:  # noqa: D102
        try:
            with os.scandir(self.path) as scan:
                return sorted(entry.name for entry in scan if entry.is_dir())
        except FileNotFoundError:
            return []

    def open(self, name: str) -> Readable:  # noqa: D102
        return _MappedFile(self.path / name)

    def open_arrow(self, name: str) -> pa.NativeFile:  # noqa: D102
        return pa.OSFile(str(self.path / name))

    def remove(self, name: str) -> None:  # noqa: D102
        (self.path / name).unlink(missing_ok=True)
        if self.path.is_dir():
            sync_folder(self.path)


def _entry(entry: "os.DirEntry[str]") -> Entry | None:
    try:
        status = entry.stat()
    except FileNotFoundError:  # a temporary file that has got its name since, or one that gc has removed
        return None
    return Entry(entry.name, status.st_size, status.st_mtime)


class _MappedFile:
    """A file mapped into memory: only the pages that are looked at are read, and they outlive the file's name.

    The kernel reads ahead, which is right for a layer from end to end. Of rows here and there it would read everything in
    between, one after the other, so they are announced first: 1/38 of the bytes, in a third of the time.
    """

    gap = 64 << 10

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            # Private: torch wants memory it may write to, and what is written stays with the reader.
            self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if self.size else b""

    def expect(self, offset: int, length: int) -> None:
        if isinstance(self._memory, mmap.mmap) and length:
            begin = offset - offset % mmap.PAGESIZE
            self._memory.madvise(mmap.MADV_WILLNEED, begin, offset + length - begin)

    def read(self, offset: int, length: int) -> bytearray | memoryview:
        return memoryview(self._memory)[offset : offset + length]


class BucketPlace(Place):
    """A folder of a bucket.

    A bucket has no folders: they are the beginnings of names. An object is visible from the moment it is whole. A writer that
    dies half-way through a large one may leave what it had sent under that name, so nothing may count that an index does not
    name; indexes are made whole before they are sent.
    """

    remote = True

    def __init__(self, uri: str, filesystem: Any, path: str) -> None:
        super().__init__(uri)
        self._filesystem = filesystem
        self._path = path

    def child(self, name: str) -> Self:  # noqa: D102
        return type(self)(f"{self.uri}/{name}", self._filesystem, f"{self._path}/{name}")

    def put(self, name: str, chunks: Iterable[Bytes]) -> None:  # noqa: D102
        with self._filesystem.open_output_stream(f"{self._path}/{name}") as stream:
            try:
                for chunk in chunks:
                    stream.write(chunk)
            except BaseException:
                # To close it is to complete the upload, and nothing else ends one: half a file then stands there.
                with suppress(OSError):
                    stream.close()
                with suppress(OSError):
                    self.remove(name)
                raise

    def entries(self) -> list[Entry]:  # noqa: D102
        return [Entry(found.base_name, found.size, found.mtime_ns / 1e9) for found in self._list() if found.is_file]

    def folders(self) -> list[str]:  # noqa: D102
        return [found.base_name for found in self._list() if not found.is_file]

    def open(self, name: str) -> Readable:  # noqa: D102
        return _RangedFile(self.open_arrow(name))

    def open_arrow(self, name: str) -> pa.NativeFile:  # noqa: D102
        return self._filesystem.open_input_file(f"{self._path}/{name}")

    def remove(self, name: str) -> None:  # noqa: D102
        try:
            self._filesystem.delete_file(f"{self._path}/{name}")
        except FileNotFoundError:
            return

    def _list(self) -> list[Any]:
        from pyarrow.fs import FileSelector

        found = self._filesystem.get_file_info(FileSelector(self._path, allow_not_found=True))
        return sorted((info for info in found if info.base_name), key=lambda info: info.base_name)


class _RangedFile:
    """An object of which ranges are asked for."""

    gap = 1 << 20

    def __init__(self, file: Any) -> None:
        self._file = file
        self.size = file.size()

    def expect(self, offset: int, length: int) -> None:
        """Do nothing: whoever wants to read ahead does so on a thread."""

    def read(self, offset: int, length: int) -> bytearray | memoryview:
        return bytearray(self._file.read_at(length, offset))


def open_place(uri: str | Path | Place) -> Place:
    """Return the folder that an address names; nothing is asked of it yet.

    Raises:
        StoreError: if the address is of a kind that no store can be at.
    """
    if isinstance(uri, Place):
        return uri
    text = str(uri)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    if "://" not in text:
        return FolderPlace(Path(text).expanduser().absolute())
    text = text.rstrip("/")
    scheme = urlsplit(text).scheme
    if scheme not in BUCKETS:
        raise StoreError(f"store {text!r}: a store can be in a folder or at {', '.join(f'{s}://' for s in BUCKETS)}")
    path = text.partition("://")[2]
    if not path.partition("/")[0] or "?" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise StoreError(f"store {text!r}: write {scheme}://BUCKET or {scheme}://BUCKET/FOLDER")
    return BucketPlace(text, _filesystem(scheme, text), path)


def _filesystem(scheme: str, uri: str) -> Any:
    from pyarrow.fs import AwsStandardS3RetryStrategy, FileSystem, S3FileSystem, resolve_s3_region

    try:
        if scheme != "s3":
            return FileSystem.from_uri(uri)[0]
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if endpoint:
            parts = urlsplit(endpoint)
            own = {"endpoint_override": parts.netloc, "scheme": parts.scheme, "region": region or "us-east-1"}
        else:
            own = {"region": region or resolve_s3_region(urlsplit(uri).netloc)}
        # Delayed: what is small goes in one PUT instead of the three requests of an upload in parts. A request is given up when
        # nothing has come for a while and tried again twice, so that a bucket that has gone silent fails a commit in minutes.
        again = AwsStandardS3RetryStrategy(max_attempts=3)
        return S3FileSystem(
            **own, allow_delayed_open=True, connect_timeout=10, request_timeout=20, retry_strategy=again
        )
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"store {uri!r} cannot be opened: {error}") from error


def check_writable(place: Place) -> None:
    """Make sure that a store can be created at a place, by creating a file there and removing it.

    Raises:
        StoreError: naming the place and the reason that the disk or the bucket gives.
    """
    name = f".write-test-{ULID()}"
    try:
        place.put(name, [b""])
        place.remove(name)
    except OSError as error:
        raise StoreError(
            f"store {place.uri!r} is not writable: {error.strerror or error}; choose another --store"
        ) from error
