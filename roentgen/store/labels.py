"""Labels added after a rollout was stored: a harness's scores, an annotator's judgments.

Index files never change, so these labels are stored beside them in `labels/<ulid>.parquet`, one row per rollout with a JSON
object. A rollout's labels are those of its index row, overlaid with those of each label file in order of name. No
coordination with writers and merges is needed: merges keep a rollout's id.
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
    """The result of adding labels."""

    changed: int = 0
    """Number of rollouts with a new or changed label."""
    same: int = 0
    """Number of rollouts that already had all labels."""
    unknown: tuple[str, ...] = ()
    """Ids that no rollout of the session has."""


def label_files(session: StorageFolder) -> list[str]:
    """Return the names of a session's label files, in the order in which they apply."""
    names = [entry.name for entry in session.child(FOLDER).entries()]
    return [name for name in names if name.endswith(".parquet") and not name.startswith(".")]


def read_label_file(session: StorageFolder, name: str) -> dict[str, dict[str, LabelValue]]:
    """Read a label file: labels by rollout id.

    Raises:
        FileNotFoundError: if the file does not exist (any more).
        StoreError: if it is damaged or has a newer schema.
    """
    where = f"label file {session.uri}/{FOLDER}/{name}"
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
    """Write labels of rollouts durably, while preventing deletion of the session.

    Raises:
        UnstorableError: if a label is not allowed.
        OSError: if the disk or the bucket reports an error.
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
    """Yield each rollout's labels: those of its index row, overlaid with those of each label file."""
    for rollout_id, labels in zip(ids, own, strict=True):
        added = [said[rollout_id] for said in later if rollout_id in said]
        yield {name: value for said in (labels, *added) for name, value in said.items()} if added else labels


def new_labels(
    stored: Mapping[str, Mapping[str, LabelValue]], labels: Mapping[str, Mapping[str, LabelValue]]
) -> dict[str, dict[str, LabelValue]]:
    """Return the labels that the stored rollouts do not have yet."""
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
