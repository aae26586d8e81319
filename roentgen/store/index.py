"""An index file: one row per rollout of the shards it names; that it is there is what makes them count.

Its metadata holds, per shard, the size and the checksum, and, if it merges others, the names of the index files that it
replaces. It is made in memory and put down in one piece.
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
"""Rows of an index that are read together: what a reader that looks for a few rollouts holds at once."""
_REPEATED = ["config_hash", "shard"]
"""Columns of few different values, which are kept once: they would be half of a large table."""
_ONE_REQUEST = 4 << 20
"""A file of a bucket that is no larger is fetched whole: cheaper than asking for its footer and its columns."""


@dataclass(frozen=True)
class ShardFile:
    """A shard as an index names it."""

    name: str
    """Its path inside the session."""
    size: int
    """In bytes."""
    checksum: str
    """XXH3-128 of the whole file, hex."""


@dataclass(frozen=True)
class IndexFile:
    """What an index file says."""

    name: str
    """Its name in the folder `index`."""
    table: pa.Table
    """Its rows, of the columns asked for."""
    shards: dict[str, ShardFile]
    """What it says of shards, by name."""
    replaces: frozenset[str]
    """Index files that no longer count, since this one holds what they held."""

    @property
    def named(self) -> list[str]:
        """The shards that its rows are in."""
        names: list[str] = self.table.column("shard").unique().to_pylist()
        return names


def write_shard(session: StorageFolder, name: str, parts: Sequence[dict[str, Tensor]], spec: CaptureSpec) -> ShardFile:
    """Write a shard of rollouts, durably; nobody sees it until an index names it.

    Raises:
        OSError: as the disk or the bucket answers.
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
    """Return an index file's bytes."""
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
    """Read an index file, its page checksums verified; of a large one, only the columns that are wanted.

    Args:
        folder: `index` of a session.
        name: the file's.
        columns: which to read; all if None.
        ids: only rows of these rollouts, found a row group at a time; all if None.

    Raises:
        FileNotFoundError: if it is not there (any more).
        StoreError: if it is damaged or of a newer schema.
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
        # Not only pyarrow's: damaged metadata is no text, no JSON, or another kind of JSON.
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
    """Add the columns that an older file does not have, as null."""
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
