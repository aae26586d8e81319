"""Labels that come after a rollout was stored: a harness' scores, an annotator's verdicts.

Index files never change, so such labels lie beside them, in `labels/<ulid>.parquet`: a row per rollout with a JSON object. A
rollout's labels are those of its index row and, over them, those of each file in order of name. Nothing has to be coordinated
with writers and merges, which know nothing of these files; merges keep a rollout's id.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter
from ulid import ULID

from roentgen.contract import Labels, LabelValue, labels_to_json
from roentgen.store.locks import writer_locks
from roentgen.store.schema import SCHEMA_VERSION, StoreError, UnstorableError, check_version, read_labels
from roentgen.store.storage_backends import StorageFolder, open_folder

FOLDER = "labels"
_LABELS: TypeAdapter[dict[str, LabelValue]] = TypeAdapter(Labels)
_SCHEMA = pa.schema(
    [("rollout_id", pa.string()), ("labels", pa.string())], metadata={"roentgen_schema": str(SCHEMA_VERSION)}
)


@dataclass(frozen=True)
class LabelChanges:
    """What adding labels has done."""

    changed: int = 0
    """Rollouts that have a label now that they had not, or with another value."""
    same: int = 0
    """Rollouts that had them all."""
    unknown: tuple[str, ...] = ()
    """Ids of no rollout of the session."""


def label_files(session: StorageFolder) -> list[str]:
    """Return the names of a session's files of labels, in the order in which they count."""
    names = [entry.name for entry in session.child(FOLDER).entries()]
    return [name for name in names if name.endswith(".parquet") and not name.startswith(".")]


def read_label_file(session: StorageFolder, name: str) -> dict[str, dict[str, LabelValue]]:
    """Read a file of labels: what it says of each rollout.

    Raises:
        FileNotFoundError: if it is not there (any more).
        StoreError: if it is damaged or of a newer schema.
    """
    where = f"file of labels {session.uri}/{FOLDER}/{name}"
    try:
        with session.child(FOLDER).open_arrow(name) as opened:
            file = pq.ParquetFile(opened, page_checksum_verification=True)
            check_version((file.schema_arrow.metadata or {}).get(b"roentgen_schema", b"").decode() or None, where)
            table = file.read(_SCHEMA.names)
        ids, spelled = (table.column(column).to_pylist() for column in _SCHEMA.names)
        return {rollout_id: read_labels(text) for rollout_id, text in zip(ids, spelled, strict=True)}
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{where} is damaged: {error}") from error


def write_labels(session: StorageFolder, labels: Mapping[str, Mapping[str, LabelValue]]) -> None:
    """Write labels of rollouts, durably; while this runs the session is not deleted.

    Raises:
        UnstorableError: if they are not what labels can be.
        OSError: as the disk or the bucket answers.
    """
    rows = [(rollout_id, _labels_json(rollout_id, said)) for rollout_id, said in labels.items()]
    columns = [pa.array(column, pa.string()) for column in zip(*rows, strict=True)]
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=_SCHEMA), buffer, write_page_checksum=True)
    locks = writer_locks(open_folder(session.uri.rpartition("/")[0]))
    locks.acquire(session.name)
    try:
        locks.confirm(session.name)
        session.child(FOLDER).put(f"{ULID()}.parquet", [bytes(buffer.getvalue())])
    finally:
        locks.release(session.name)


def _labels_json(rollout_id: str, labels: Mapping[str, LabelValue]) -> str:
    try:
        return labels_to_json(_LABELS.validate_python(dict(labels)))
    except ValueError as error:
        first: Any = error.errors()[0] if hasattr(error, "errors") else {"loc": (), "msg": str(error)}
        name = "".join(f"{part!r}: " for part in first["loc"][:1])
        raise UnstorableError(
            f"labels of rollout {rollout_id}: {name}{first['msg'].removeprefix('Value error, ')}"
        ) from error


def overlay_labels(
    ids: Collection[str], own: Collection[dict[str, LabelValue]], later: Collection[dict[str, dict[str, LabelValue]]]
) -> Iterator[dict[str, LabelValue]]:
    """Yield the labels of rollouts: their own, and over them what each file says."""
    for rollout_id, labels in zip(ids, own, strict=True):
        added = [said[rollout_id] for said in later if rollout_id in said]
        yield {name: value for said in (labels, *added) for name, value in said.items()} if added else labels


def new_labels(
    stored: Mapping[str, Mapping[str, LabelValue]], labels: Mapping[str, Mapping[str, LabelValue]]
) -> dict[str, dict[str, LabelValue]]:
    """Return what of labels the rollouts stored do not say yet."""
    found = {}
    for rollout_id, said in labels.items():
        own = stored.get(rollout_id)
        if own is None:
            continue
        new = {name: value for name, value in said.items() if name not in own or not _same(own[name], value)}
        if new:
            found[rollout_id] = new
    return found


def _same(one: LabelValue, other: LabelValue) -> bool:
    return json.dumps(one) == json.dumps(other)  # true is not 1, and 1.0 is not 1
