"""The storage backends of a store: a local folder or an object-storage bucket, behind one interface.

A store's files are written once and never changed, so a backend only creates, lists, reads and removes files. A local
folder uses atomic, fsynced writes (`roentgen.atomic_files`) and memory-mapped reads. A bucket stores each file as one object,
which becomes visible when its last byte has arrived, and is read in byte ranges.

    s3://bucket/folder      credentials and region as AWS's tools find them; AWS_ENDPOINT_URL selects another S3 server
    gs://…, abfss://…       configured as pyarrow's documentation describes
    anything else           a folder on a local or mounted disk
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
class FileEntry:
    """A file in a folder: its name, its size in bytes, and the time of its last write in seconds since 1970."""

    name: str
    size: int
    modified: float


class ReadableFile(Protocol):
    """An open file with random access."""

    size: int
    """Size in bytes."""
    gap: int
    """Largest gap in bytes between two ranges that are read as one, because a second request would cost more."""

    def expect(self, offset: int, length: int) -> None:
        """Prefetch a range in the background, if the backend can."""

    def read(self, offset: int, length: int) -> bytearray | memoryview:
        """Return `length` bytes from `offset` as memory that the caller may overwrite."""


class StorageFolder(ABC):
    """A folder of a storage backend.

    Attributes:
        uri: its absolute address, as `open_folder` takes it.
    """

    remote: bool
    """True if reads wait for a network, so that concurrent reads are faster than sequential ones."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def __str__(self) -> str:
        return self.uri

    @property
    def name(self) -> str:
        """The last component of the address."""
        return self.uri.rstrip("/").rsplit("/", 1)[-1]

    @abstractmethod
    def child(self, name: str) -> Self:
        """Return a subfolder, which need not exist."""

    @abstractmethod
    def put(self, name: str, chunks: Iterable[Bytes]) -> None:
        """Create a file atomically; it is durable when this returns.

        Raises:
            OSError: if the disk or the bucket reports an error.
        """

    @abstractmethod
    def entries(self) -> list[FileEntry]:
        """List the files directly in this folder, sorted by name; empty if the folder does not exist."""

    @abstractmethod
    def folders(self) -> list[str]:
        """List the names of the direct subfolders, sorted."""

    @abstractmethod
    def open(self, name: str) -> ReadableFile:
        """Open a file for reading.

        Raises:
            FileNotFoundError: if it does not exist.
            OSError: if the disk or the bucket reports an error.
        """

    @abstractmethod
    def open_arrow(self, name: str) -> pa.NativeFile:
        """Open a file as a pyarrow file object.

        Raises:
            FileNotFoundError: if it does not exist.
            OSError: if the disk or the bucket reports an error.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""

    def read(self, name: str) -> bytes:
        """Return a file's bytes.

        Raises:
            FileNotFoundError: if it does not exist.
        """
        file = self.open(name)
        return bytes(file.read(0, file.size))

    def stream(self, name: str) -> tuple[int, Iterator[Bytes]]:
        """Return a file's size and an iterator over its bytes, a few megabytes at a time.

        Raises:
            FileNotFoundError: if it does not exist.
        """
        file = self.open(name)
        return file.size, (file.read(offset, min(_PIECE, file.size - offset)) for offset in range(0, file.size, _PIECE))


class LocalFolder(StorageFolder):
    """A folder on a local or mounted disk."""

    remote = False

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path

    def child(self, name: str) -> Self:  # noqa: D102 - documented in StorageFolder
        return type(self)(self.path / name)

    def put(self, name: str, chunks: Iterable[Bytes]) -> None:  # noqa: D102
        make_folder(self.path)
        with atomic_write(self.path / name) as temporary:
            write_chunks(temporary, chunks)

    def entries(self) -> list[FileEntry]:  # noqa: D102
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

    def open(self, name: str) -> ReadableFile:  # noqa: D102
        return _MappedFile(self.path / name)

    def open_arrow(self, name: str) -> pa.NativeFile:  # noqa: D102
        return pa.OSFile(str(self.path / name))

    def remove(self, name: str) -> None:  # noqa: D102
        (self.path / name).unlink(missing_ok=True)
        if self.path.is_dir():
            sync_folder(self.path)


def _entry(entry: "os.DirEntry[str]") -> FileEntry | None:
    try:
        status = entry.stat()
    except FileNotFoundError:  # a temporary file that has been renamed since, or a file that gc has removed
        return None
    return FileEntry(entry.name, status.st_size, status.st_mtime)


class _MappedFile:
    """A memory-mapped file: only pages that are accessed are read, and they stay valid after the file is unlinked.

    The kernel's readahead suits a layer that is read from end to end. For scattered rows it would also read everything
    between them, so `expect` announces the rows first: 1/38 of the bytes, in a third of the time.
    """

    gap = 64 << 10

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            # Private mapping: torch requires writable memory, and writes must not reach the file.
            self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if self.size else b""

    def expect(self, offset: int, length: int) -> None:
        if isinstance(self._memory, mmap.mmap) and length:
            begin = offset - offset % mmap.PAGESIZE
            self._memory.madvise(mmap.MADV_WILLNEED, begin, offset + length - begin)

    def read(self, offset: int, length: int) -> bytearray | memoryview:
        return memoryview(self._memory)[offset : offset + length]


class BucketFolder(StorageFolder):
    """A folder of a bucket.

    Folders of a bucket are prefixes of object names. An object becomes visible when it is complete. A writer that dies
    while it uploads a large object may leave a partial one, so readers ignore shards that no index names. An index is built
    in memory and uploaded at once.
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
                # pyarrow cannot abort an upload: closing the stream completes it and leaves a partial object.
                with suppress(OSError):
                    stream.close()
                with suppress(OSError):
                    self.remove(name)
                raise

    def entries(self) -> list[FileEntry]:  # noqa: D102
        return [FileEntry(found.base_name, found.size, found.mtime_ns / 1e9) for found in self._list() if found.is_file]

    def folders(self) -> list[str]:  # noqa: D102
        return [found.base_name for found in self._list() if not found.is_file]

    def open(self, name: str) -> ReadableFile:  # noqa: D102
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
    """An object that is read in ranges."""

    gap = 1 << 20

    def __init__(self, file: Any) -> None:
        self._file = file
        self.size = file.size()

    def expect(self, offset: int, length: int) -> None:
        """Do nothing: callers read ahead on threads of their own."""

    def read(self, offset: int, length: int) -> bytearray | memoryview:
        return bytearray(self._file.read_at(length, offset))


def open_folder(uri: str | Path | StorageFolder) -> StorageFolder:
    """Return the folder at an address, without accessing it.

    Raises:
        StoreError: if no storage backend supports the address.
    """
    if isinstance(uri, StorageFolder):
        return uri
    text = str(uri)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    if "://" not in text:
        return LocalFolder(Path(text).expanduser().absolute())
    text = text.rstrip("/")
    scheme = urlsplit(text).scheme
    if scheme not in BUCKETS:
        raise StoreError(
            f"store {text!r}: allowed are a folder and addresses that begin with {', '.join(f'{s}://' for s in BUCKETS)}"
        )
    path = text.partition("://")[2]
    if not path.partition("/")[0] or "?" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise StoreError(f"store {text!r}: write {scheme}://BUCKET or {scheme}://BUCKET/FOLDER")
    return BucketFolder(text, _filesystem(scheme, text), path)


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
        # Delayed open: a small file takes one PUT instead of the three requests of a multipart upload. The timeouts and two
        # retries let a commit to an unresponsive bucket fail within minutes.
        again = AwsStandardS3RetryStrategy(max_attempts=3)
        return S3FileSystem(
            **own, allow_delayed_open=True, connect_timeout=10, request_timeout=20, retry_strategy=again
        )
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"store {uri!r} cannot be opened: {error}") from error


def check_writable(folder: StorageFolder) -> None:
    """Check that a folder is writable by creating and removing a file in it.

    Raises:
        StoreError: if it is not; the message names the folder and the reason.
    """
    name = f".write-test-{ULID()}"
    try:
        folder.put(name, [b""])
        folder.remove(name)
    except OSError as error:
        raise StoreError(
            f"store {folder.uri!r} is not writable: {error.strerror or error}; choose another --store"
        ) from error
