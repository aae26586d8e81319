"""What can be asked of whole sessions: which are there, what they hold, whether every byte is still what was written."""

import shutil
import tarfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from roentgen.contract import check_session_id
from roentgen.store.durable import local_root, sync_folder
from roentgen.store.locks import deleting
from roentgen.store.reader import Session, Shard, read_index
from roentgen.store.schema import INDEX_SCHEMA, StoreError, rows_checksum

_BLOCK, _PIECE = tarfile.BLOCKSIZE, 1 << 20


@dataclass(frozen=True)
class SessionSummary:
    """What a session holds.

    Attributes:
        session_id: its name.
        uri: its address.
        rollouts: committed rollouts, retried ones counted once.
        tokens: rows a full capture of them has.
        shards: shards that an index names.
        bytes: size of those shards.
        keys: stored keys.
        models: served names of the models captured.
    """

    session_id: str
    uri: str
    rollouts: int
    tokens: int
    shards: int
    bytes: int
    keys: list[str]
    models: list[str]


@dataclass(frozen=True)
class Damage:
    """One thing wrong: which rollout (None for a whole file), in which file, and what."""

    rollout_id: str | None
    file: str
    what: str


@dataclass(frozen=True)
class VerifyReport:
    """The result of reading a session back.

    Attributes:
        rollouts: rollouts whose checksum was recomputed and is right.
        damage: everything that is wrong.
        orphans: shards no index names: left by a crash, invisible to readers.
    """

    rollouts: int
    damage: list[Damage] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)

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
    return Session.open(local_root(store) / check_session_id(session_id))


def list_sessions(store: str | Path) -> list[SessionSummary]:
    """Summarise every session of a store, in order of name; a store that does not exist yet has none."""
    root = local_root(store)
    return [summarise(Session.open(file.parent)) for file in sorted(root.glob("*/session.json"))]


def summarise(session: Session) -> SessionSummary:
    """Count what a session holds, from its index and shard headers."""
    frame = session.rollouts()
    shards = list(dict.fromkeys(session.rollouts(unique=False)["shard"]))
    specs = [session.spec(shard) for shard in shards]
    return SessionSummary(
        session_id=session.name,
        uri=str(session.path),
        rollouts=len(frame),
        tokens=int((frame["n_prompt"] + (frame["n_completion"] - 1).clip(lower=0)).sum()),
        shards=len(shards),
        bytes=sum((session.path / shard).stat().st_size for shard in shards),
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
    root = local_root(store)
    with deleting(root, session_id):
        size = sum(path.stat().st_size for path in session.path.rglob("*") if path.is_file())
        # Gone in one step for readers and writers; a crash from here on leaves a folder that nobody sees.
        grave = root / f".deleted-{session_id}-{uuid.uuid4().hex}"
        session.path.rename(grave)
        sync_folder(root)
        shutil.rmtree(grave)
    return size


def tar_session(session: Session) -> tuple[int, Iterator[bytes]]:
    """Pack a session as a tar archive: its identity, and what is committed now, also while more is being written.

    Returns:
        The archive's size in bytes, and its pieces.
    """
    index = session.index_files()
    shards = sorted({shard for file in index for shard in read_index(file)["shard"].to_pylist()})
    files = [session.path / "session.json", *(session.path / shard for shard in shards), *index]
    members = [(path, path.stat().st_size) for path in files]
    blocks = sum(_BLOCK + size + -size % _BLOCK for _, size in members) + 2 * _BLOCK

    def pieces() -> Iterator[bytes]:
        for path, size in members:
            header = tarfile.TarInfo(f"{session.name}/{path.relative_to(session.path)}")
            header.size, header.mtime = size, int(path.stat().st_mtime)
            yield header.tobuf(tarfile.USTAR_FORMAT)
            with path.open("rb") as file:
                while piece := file.read(_PIECE):
                    yield piece
            yield bytes(-size % _BLOCK)
        yield bytes(2 * _BLOCK)

    return blocks, pieces()


def verify(session: Session) -> VerifyReport:
    """Read every committed rollout back and recompute its checksum; damage is collected, not raised."""
    damage: list[Damage] = []
    frames = []
    for file in session.index_files():
        try:
            frames.append(read_index(file).to_pandas())
        except StoreError as error:
            damage.append(Damage(None, f"index/{file.name}", str(error)))
    if not frames:
        frames = [INDEX_SCHEMA.empty_table().to_pandas()]
    frame = pd.concat(frames)
    good = 0
    for shard_name, rows in frame.groupby("shard"):
        found = _verify_shard(session, str(shard_name), rows)
        damage += found
        good += len(rows) - len(found)
    named = set(frame["shard"])
    on_disk = {f"shards/{path.name}" for path in (session.path / "shards").glob("*.safetensors")}
    return VerifyReport(good, damage, sorted(on_disk - named))


def _verify_shard(session: Session, shard_name: str, rows: pd.DataFrame) -> list[Damage]:
    try:
        shard = Shard(session.path / shard_name)
    except StoreError as error:
        return [Damage(rollout_id, shard_name, str(error)) for rollout_id in rows["rollout_id"]]
    damage = []
    for row in rows.to_dict("records"):
        tensors = {name: shard.rows(name, row["row_start"], row["row_stop"]) for name in shard.names}
        if rows_checksum(tensors) != row["checksum"]:
            what = "checksum differs: the stored bytes have changed"
            damage.append(Damage(row["rollout_id"], shard_name, what))
    return damage
