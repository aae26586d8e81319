"""Index files: one row per rollout of the shards they name. A shard is committed if an index file names it.

The metadata holds each shard's size and checksum and, if the file results from a merge, the names of the index files it
replaces. An index file is built in memory and written at once.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
from torch import Tensor

from roentgen.store.schema import ADDED_COLUMNS, INDEX_SCHEMA, SCHEMA_VERSION, CaptureSpec, StoreError, check_version
from roentgen.store.shards import shard_bytes
from roentgen.store.storage_backends import StorageFolder

ROW_GROUP = 8192
"""Rows per row group: what a reader that searches for a few rollouts holds in memory at once."""
_REPEATED = ["config_hash", "shard"]
"""Columns with few distinct values, read as dictionaries: they would be half of a large table."""
_ONE_REQUEST = 4 << 20
"""Files of a bucket up to this size are fetched whole: cheaper than separate requests for footer and columns."""


@dataclass(frozen=True)
class ShardFile:
    """A shard as listed in an index file."""

    name: str
    """Its path inside the session."""
    size: int
    """Size in bytes."""
    checksum: str
    """XXH3-128 of the whole file, hex."""


@dataclass(frozen=True)
class IndexFile:
    """The contents of an index file."""

    name: str
    """File name in the folder `index`."""
    table: pa.Table
    """Its rows, with the requested columns."""
    shards: dict[str, ShardFile]
    """Its shards by name."""
    replaces: frozenset[str]
    """Index files that this one replaces."""

    @property
    def named(self) -> list[str]:
        """Names of the shards that its rows refer to."""
        names: list[str] = self.table.column("shard").unique().to_pylist()
        return names


def write_shard(session: StorageFolder, name: str, parts: Sequence[dict[str, Tensor]], spec: CaptureSpec) -> ShardFile:
    """Write a shard durably; it is invisible to readers until an index names it.

    Raises:
        OSError: if the disk or the bucket reports an error.
    """
    digest, size = xxhash.xxh3_128(), 0

    def watched() -> Any:
        nonlocal size
        for chunk in shard_bytes(parts, spec):
            digest.update(chunk)
            size += len(chunk)
            yield chunk

    session.child("shards").put(f"{name}.safetensors", watched())
    return ShardFile(shard_name(name), size, digest.hexdigest())


def shard_name(name: str) -> str:
    """Return a shard's path inside its session."""
    return f"shards/{name}.safetensors"


def index_bytes(table: pa.Table, shards: Sequence[ShardFile], replaces: Sequence[str] = ()) -> bytes:
    """Serialize an index file."""
    metadata = {
        "roentgen_schema": str(SCHEMA_VERSION),
        "shards": json.dumps({shard.name: {"bytes": shard.size, "xxh3_128": shard.checksum} for shard in shards}),
        "replaces": json.dumps(sorted(replaces)),
    }
    buffer = pa.BufferOutputStream()
    table = table.cast(INDEX_SCHEMA).replace_schema_metadata(metadata)
    pq.write_table(table, buffer, write_page_checksum=True, row_group_size=ROW_GROUP)
    return bytes(buffer.getvalue())


def read_index(
    folder: StorageFolder, name: str, columns: Sequence[str] | None = None, *, ids: pa.Array | None = None
) -> IndexFile:
    """Read an index file and verify its page checksums; of a large file, only the wanted columns are read.

    Args:
        folder: `index` of a session.
        name: the file's name.
        columns: columns to read; all if None.
        ids: rollouts to read, searched one row group at a time; all if None.

    Raises:
        FileNotFoundError: if the file does not exist (any more).
        StoreError: if it is damaged or has a newer schema.
    """
    where = f"index file {folder.uri}/{name}"
    try:
        with folder.open_arrow(name) as opened:
            whole = folder.remote and opened.size() <= _ONE_REQUEST
            source = pa.BufferReader(opened.read()) if whole else opened
            file = pq.ParquetFile(
                source, read_dictionary=_REPEATED, pre_buffer=folder.remote, page_checksum_verification=True
            )
            metadata = file.metadata.metadata or {}
            version = metadata.get(b"roentgen_schema", b"").decode()
            check_version(version or None, where)
            _check_columns(file.schema_arrow, where)
            wanted = list(columns) if columns is not None else INDEX_SCHEMA.names
            there = [name for name in wanted if name in file.schema_arrow.names]
            table = file.read(there) if ids is None else _read_some(file, there, ids)
            table = _with_added(table, wanted)
        shards = json.loads(metadata.get(b"shards", b"{}"))
        replaces = frozenset(json.loads(metadata.get(b"replaces", b"[]")))
        named = {name: ShardFile(name, int(shard["bytes"]), str(shard["xxh3_128"])) for name, shard in shards.items()}
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        # Other errors too: damaged metadata may not be text, JSON, or the expected JSON.
        raise StoreError(f"{where} is damaged: {error}") from error
    return IndexFile(name, table.replace_schema_metadata(None).unify_dictionaries(), named, replaces)


def _read_some(file: pq.ParquetFile, columns: list[str], ids: pa.Array) -> pa.Table:
    found = []
    for group in range(file.num_row_groups):
        mask = pc.is_in(file.read_row_group(group, ["rollout_id"]).column(0), value_set=ids)
        if pc.any(mask).as_py():
            found.append(file.read_row_group(group, columns).filter(mask))
    return pa.concat_tables(found) if found else file.schema_arrow.empty_table().select(columns)


def _with_added(table: pa.Table, wanted: Sequence[str]) -> pa.Table:
    """Add columns that older files lack, as null."""
    for name in wanted:
        if name in ADDED_COLUMNS and name not in table.column_names:
            table = table.append_column(INDEX_SCHEMA.field(name), pa.nulls(len(table), INDEX_SCHEMA.field(name).type))
    return table.select(list(wanted))


def _check_columns(stored: pa.Schema, where: str) -> None:
    plain = pa.schema(
        [f.with_type(f.type.value_type) if pa.types.is_dictionary(f.type) else f for f in stored], stored.metadata
    )
    at_first = pa.schema([field for field in INDEX_SCHEMA if field.name not in ADDED_COLUMNS], INDEX_SCHEMA.metadata)
    if not plain.equals(INDEX_SCHEMA) and not plain.equals(at_first):
        raise StoreError(f"{where} is damaged: its columns are not those of schema {SCHEMA_VERSION}")
