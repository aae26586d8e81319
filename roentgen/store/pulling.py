"""Downloads a session from a server or copies it from another store.

A session's files never change, so files that already exist locally are not fetched again: an interrupted pull resumes where
it stopped. Shards are fetched first and indexes last, so that incomplete data stays invisible.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from httpx2 import HTTPError

from roentgen.contract import check_session_id
from roentgen.http_client import connect, explain
from roentgen.store.files import is_session_file, read_file, session_files
from roentgen.store.reader import Session
from roentgen.store.schema import StoreError
from roentgen.store.storage_backends import Bytes, open_folder

_TIMEOUT_S = 60.0

Files = list[tuple[str, int]]
FetchFile = Callable[[str], Iterator[Bytes]]


def pull(
    source: str,
    store: str,
    *,
    api_key: str = "none",
    shards: bool = True,
    on_progress: Callable[[int, int], None] = lambda done, size: None,
) -> str:
    """Copy a session into a store.

    Args:
        source: a session's address, or http://SERVER/v1/activations/session/ID.
        store: the target store; the session keeps its name.
        api_key: the server's API key.
        shards: True to include activations; otherwise only texts, tokens and labels are copied.
        on_progress: called with the bytes copied and the total.

    Returns:
        The address of the copy.

    Raises:
        StoreError: if the source cannot be read; files copied so far are kept and not fetched again.
        OSError: if the disk or the bucket reports an error.
    """
    with _opened(source, api_key) as (name, files, fetch):
        target = open_folder(store).child(name)
        files = [(path, length) for path, length in files if shards or not path.startswith("shards/")]
        size, done = sum(length for _, length in files), 0
        folders = {folder: target.child(folder).entries() for folder in ("shards", "index", "labels")}
        here = {f"{folder}/{entry.name}": entry.size for folder, entries in folders.items() for entry in entries}
        here |= {entry.name: entry.size for entry in target.entries()}
        for path, length in files:
            folder, _, file = path.rpartition("/")
            if here.get(path) != length:
                pieces = (
                    fetch(path) if folder == "shards" else [b"".join(fetch(path))]
                )  # an index must never be partial
                (target.child(folder) if folder else target).put(file, pieces)
            done += length
            on_progress(done, size)
    return target.uri


@contextmanager
def _opened(source: str, api_key: str) -> Iterator[tuple[str, Files, FetchFile]]:
    if source.startswith(("http://", "https://")):
        with _server(source.rstrip("/"), api_key) as opened:
            yield opened
        return
    session = Session.open(source)
    files = [(entry.name, entry.size) for entry in session_files(session)]
    yield session.name, files, lambda path: read_file(session, path)[1]


@contextmanager
def _server(address: str, api_key: str) -> Iterator[tuple[str, Files, FetchFile]]:
    with connect(address, api_key, _TIMEOUT_S) as client:
        try:
            listed = client.get("files").raise_for_status().json()["data"]
            files = [(str(file["name"]), int(file["size"])) for file in listed]
            name = check_session_id(address.rpartition("/")[2])
        except HTTPError as error:
            raise StoreError(f"{address} is not a session of a server: {address}/files {explain(error)}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{address} is not a session of a server: {error!r}") from error
        if unsafe := [path for path, _ in files if not is_session_file(path)]:
            raise StoreError(f"{address} lists {unsafe[0]!r}, which is not a file of a session")

        def fetch(path: str) -> Iterator[Bytes]:
            try:
                with client.stream("GET", f"files/{path}") as reply:
                    if reply.is_error:
                        reply.read()
                    yield from reply.raise_for_status().iter_bytes(1 << 20)
            except HTTPError as error:
                raise StoreError(f"{address}/files/{path} {explain(error)}; run the pull again to continue") from error

        yield name, files, fetch
