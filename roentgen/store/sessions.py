"""Operations on whole sessions: list, summarize, verify and delete."""

import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import pandas as pd
import xxhash

from roentgen.atomic_files import sync_folder
from roentgen.contract import check_session_id, count_rows
from roentgen.store.files import read_file
from roentgen.store.index import ShardFile, read_index
from roentgen.store.labels import label_files, read_label_file
from roentgen.store.locks import deleting
from roentgen.store.reader import Session
from roentgen.store.schema import INDEX_SCHEMA, SessionNotFoundError, StoreError, rows_checksum
from roentgen.store.storage_backends import LocalFolder, StorageFolder, open_folder

_VERIFIED = ("shard", "row_start", "row_stop", "checksum")


@dataclass(frozen=True)
class SessionSummary:
    """A summary of a session."""

    session_id: str
    """Its name."""
    uri: str
    """Its address."""
    rollouts: int
    """Committed rollouts, retried ones counted once."""
    tokens: int
    """Rows of their full captures."""
    shards: int
    """Shards that an index names."""
    bytes: int
    """Size of the shards in bytes."""
    keys: list[str]
    """Stored keys."""
    models: list[str]
    """Served names of the models captured."""
    damage: str = ""
    """Why it cannot be read, if so; then only its size is known."""


@dataclass(frozen=True)
class Damage:
    """A damaged rollout or file (`rollout_id` is None for a whole file), and what is wrong."""

    rollout_id: str | None
    file: str
    what: str


@dataclass(frozen=True)
class VerifyReport:
    """The result of verifying a session."""

    rollouts: int
    """Number of rollouts with a correct checksum."""
    damage: list[Damage] = field(default_factory=list)
    """All damage found."""
    orphans: list[str] = field(default_factory=list)
    """Shards that no index names: left by a crash and invisible to readers."""

    @property
    def ok(self) -> bool:
        """True if nothing is damaged (orphans are not damage)."""
        return not self.damage


def find_session(store: str | Path, session_id: str) -> Session:
    """Open a session of a store by its id.

    Raises:
        ValueError: if the id is unsafe.
        SessionNotFoundError: if there is no such session.
    """
    return Session.open(open_folder(store).child(check_session_id(session_id)))


def list_sessions(store: str | Path) -> list[SessionSummary]:
    """Summarize every session of a store, sorted by name, including unreadable ones; a store that does not exist yet
    has none.

    Raises:
        StoreError: if the store cannot be reached.
    """
    root = open_folder(store)
    try:
        folders = [root.child(name) for name in root.folders() if not name.startswith(".")]
        sessions = [folder for folder in folders if any(entry.name == "session.json" for entry in folder.entries())]
    except OSError as error:
        raise StoreError(f"store {root.uri} cannot be read: {error}") from error
    return [summarize_session(folder) for folder in sessions]


def summarize_session(folder: StorageFolder) -> SessionSummary:
    """Summarize a session from its index and shard headers; for an unreadable one, `damage` says why.

    Raises:
        SessionNotFoundError: if there is no session.
    """
    try:
        return _summarize(Session.open(folder))
    except SessionNotFoundError:
        raise
    except StoreError as error:
        size = sum(entry.size for name in ("shards", "index") for entry in folder.child(name).entries())
        return SessionSummary(folder.name, folder.uri, 0, 0, 0, size, [], [], str(error))


def _summarize(session: Session) -> SessionSummary:
    frame = session.rollouts(columns=())
    shards = list(session.shard_files())
    sizes = {f"shards/{entry.name}": entry.size for entry in session.folder.child("shards").entries()}
    specs = [session.spec(shard) for shard in shards]
    return SessionSummary(
        session_id=session.name,
        uri=session.uri,
        rollouts=len(frame),
        tokens=int(count_rows(frame["n_prompt"], frame["n_completion"]).sum()),
        shards=len(shards),
        bytes=sum(sizes.get(shard, 0) for shard in shards),
        keys=list(dict.fromkeys(key for spec in specs for key in spec.keys)),
        models=list(dict.fromkeys(spec.model for spec in specs)),
    )


def delete_session(store: str | Path, session_id: str) -> int:
    """Delete a session and all its files.

    Returns:
        The number of bytes freed.

    Raises:
        ValueError: if the id is unsafe.
        SessionBusyError: if it is being written.
        SessionNotFoundError: if there is no such session.
    """
    session = find_session(store, session_id)
    root = open_folder(store)
    with deleting(root, session_id):
        if isinstance(root, LocalFolder):
            return _delete_folder(root.path, session_id)
        return _delete_objects(session.folder)


def _delete_folder(root: Path, session_id: str) -> int:
    folder = root / session_id
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    # The rename removes the session atomically for readers and writers; a crash afterwards leaves only an invisible folder.
    tombstone = root / f".deleted-{session_id}-{uuid.uuid4().hex}"
    folder.rename(tombstone)
    sync_folder(root)
    shutil.rmtree(tombstone)
    return size


def _delete_objects(session: StorageFolder) -> int:
    """Remove the indexes first and session.json last, so that after a crash the deletion can be repeated."""
    size = 0
    for folder in (*(session.child(name) for name in ("index", "labels", "shards")), session):
        for entry in folder.entries():
            folder.remove(entry.name)
            size += entry.size
    return size


def verify(session: Session) -> VerifyReport:
    """Verify the checksum of every shard, and of its rollouts if it differs; damage is collected, not raised."""
    damage: list[Damage] = []
    files = []
    folder = session.folder.child("index")
    for entry in folder.entries():
        if entry.name.startswith("."):
            continue
        try:
            files.append(read_index(folder, entry.name, (*_VERIFIED, "rollout_id")))
        except StoreError as error:
            damage.append(Damage(None, f"index/{entry.name}", str(error)))
    replaced = {name for file in files for name in file.replaces}
    frames = [file.table.to_pandas() for file in files if file.name not in replaced]
    frame = pd.concat(frames or [INDEX_SCHEMA.empty_table().to_pandas()]).drop_duplicates("rollout_id", keep="last")
    shards = {name: shard for file in files for name, shard in file.shards.items()}
    good = 0
    for name, rows in frame.groupby("shard"):
        found = _verify_shard(session, str(name), shards.get(str(name)), rows)
        damage += found
        good += len(rows) - len(found)
    for name in label_files(session.folder):
        try:
            read_label_file(session.folder, name)
        except StoreError as error:
            damage.append(Damage(None, f"labels/{name}", str(error)))
    named = {PurePosixPath(shard).name for file in files for shard in file.named}
    there = [e.name for e in session.folder.child("shards").entries() if not e.name.startswith(".")]
    return VerifyReport(good, damage, [f"shards/{name}" for name in there if name not in named])


def _is_whole(session: Session, shard: ShardFile) -> bool:
    digest = xxhash.xxh3_128()
    try:
        for piece in read_file(session, shard.name)[1]:
            digest.update(piece)
    except OSError:  # `_verify_shard` reports the error
        return False
    return digest.hexdigest() == shard.checksum


def _verify_shard(session: Session, shard_name: str, written: ShardFile | None, rows: pd.DataFrame) -> list[Damage]:
    if written is not None and _is_whole(session, written):
        return []
    try:
        shard = session.shard(shard_name)
    except StoreError as error:
        return [Damage(rollout_id, shard_name, str(error)) for rollout_id in rows["rollout_id"]]
    damage = []
    for row in rows.to_dict("records"):
        try:
            tensors = {name: shard.rows(name, row["row_start"], row["row_stop"]) for name in shard.names}
        except StoreError as error:
            damage.append(Damage(row["rollout_id"], shard_name, str(error)))
            continue
        if rows_checksum(tensors) != row["checksum"]:
            what = "checksum differs: the stored bytes have changed"
            damage.append(Damage(row["rollout_id"], shard_name, what))
    return damage
