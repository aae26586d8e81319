"""What can be asked of whole sessions: which are there, what they hold, whether every byte is still what was written."""

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
    """What a session holds."""

    session_id: str
    """Its name."""
    uri: str
    """Its address."""
    rollouts: int
    """Committed rollouts, retried ones counted once."""
    tokens: int
    """Rows a full capture of them has."""
    shards: int
    """Shards that an index names."""
    bytes: int
    """Size of those shards."""
    keys: list[str]
    """Stored keys."""
    models: list[str]
    """Served names of the models captured."""
    damage: str = ""
    """Why it cannot be read, if so; nothing but its size is known then."""


@dataclass(frozen=True)
class Damage:
    """One thing wrong: which rollout (None for a whole file), in which file, and what."""

    rollout_id: str | None
    file: str
    what: str


@dataclass(frozen=True)
class VerifyReport:
    """The result of reading a session back."""

    rollouts: int
    """Rollouts whose checksum was recomputed and is right."""
    damage: list[Damage] = field(default_factory=list)
    """Everything that is wrong."""
    orphans: list[str] = field(default_factory=list)
    """Shards no index names: left by a crash, invisible to readers."""

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged (orphans are not damage)."""
        return not self.damage


def find_session(store: str | Path, session_id: str) -> Session:
    """Open a session of a store by its id.

    Raises:
        ValueError: if the id is unsafe.
        SessionNotFoundError: if there is no such session.
    """
    return Session.open(open_folder(store).child(check_session_id(session_id)))


def list_sessions(store: str | Path) -> list[SessionSummary]:
    """Summarise every session of a store, in order of name, also those that cannot be read; a store that does not exist yet
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
    """Count what a session holds, from its index and shard headers; one that cannot be read says why.

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
    """Delete a session and all it holds.

    Returns:
        The bytes that are free now.

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
    # Gone in one step for readers and writers; a crash from here on leaves a folder that nobody sees.
    tombstone = root / f".deleted-{session_id}-{uuid.uuid4().hex}"
    folder.rename(tombstone)
    sync_folder(root)
    shutil.rmtree(tombstone)
    return size


def _delete_objects(session: StorageFolder) -> int:
    """Remove what makes rollouts count first, and the session's name last, so that a crash leaves a session to delete again."""
    size = 0
    for folder in (*(session.child(name) for name in ("index", "labels", "shards")), session):
        for entry in folder.entries():
            folder.remove(entry.name)
            size += entry.size
    return size


def verify(session: Session) -> VerifyReport:
    """Read every shard back and recompute its checksum, and its rollouts' where it differs; damage is collected, not raised."""
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
    except OSError:  # which `_verify_shard` meets again, and names
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
