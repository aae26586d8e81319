"""An index file: one row per rollout of the shards it names; that it is there is what makes them count.

Its metadata holds, per shard, the size and the checksum, and, if it merges others, the names of the index files that it
replaces. It is made in memory and put down in one piece.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from torch import Tensor

from roentgen.store.places import Place
from roentgen.store.schema import INDEX_SCHEMA, SCHEMA_VERSION, CaptureSpec, StoreError, check_version
from roentgen.store.shards import shard_bytes


@dataclass(frozen=True)
class ShardFile:
    """A shard as an index names it.

    Attributes:
        name: its path inside the session.
        size: in bytes.
        checksum: XXH3-128 of the whole file, hex.
    """

    name: str
    size: int
    checksum: str


@dataclass(frozen=True)
class IndexFile:
    """What an index file says.

    Attributes:
        name: its name in the folder `index`.
        table: its rows, of the columns asked for.
        shards: the shards it names.
        replaces: index files that no longer count, since this one holds what they held.
    """

    name: str
    table: pa.Table
    shards: dict[str, ShardFile]
    replaces: frozenset[str]


def write_shard(session: Place, name: str, parts: Sequence[dict[str, Tensor]], spec: CaptureSpec) -> ShardFile:
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
    return ShardFile(f"shards/{name}.safetensors", size, digest.hexdigest())


def index_bytes(
    rows: Sequence[dict[str, Any]] | pa.Table, shards: Sequence[ShardFile], replaces: Sequence[str] = ()
) -> bytes:
    """Return an index file's bytes."""
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(list(rows), schema=INDEX_SCHEMA)
    metadata = {
        "roentgen_schema": str(SCHEMA_VERSION),
        "shards": json.dumps({shard.name: {"bytes": shard.size, "xxh3_128": shard.checksum} for shard in shards}),
        "replaces": json.dumps(sorted(replaces)),
    }
    buffer = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(metadata), buffer, write_page_checksum=True)
    return bytes(buffer.getvalue())


def read_index(folder: Place, name: str, columns: Sequence[str] | None = None) -> IndexFile:
    """Read an index file, its page checksums verified.

    Args:
        folder: `index` of a session.
        name: the file's.
        columns: which to read; all if None.

    Raises:
        FileNotFoundError: if it is not there (any more).
        StoreError: if it is damaged or of a newer schema.
    """
    where = f"index file {folder.uri}/{name}"
    try:
        body = folder.read(name)
        file = pq.ParquetFile(pa.BufferReader(body), page_checksum_verification=True)
        metadata = file.schema_arrow.metadata or {}
        version = metadata.get(b"roentgen_schema", b"").decode()
        if version.isdigit() and int(version) <= SCHEMA_VERSION and not file.schema_arrow.equals(INDEX_SCHEMA):
            raise StoreError(f"{where} is damaged: its columns are not those of schema {version}")
        table = file.read(list(columns) if columns is not None else None)
        shards = json.loads(metadata.get(b"shards", b"{}"))
        replaces = frozenset(json.loads(metadata.get(b"replaces", b"[]")))
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: damaged names are not text
        raise StoreError(f"{where} is damaged: {error}") from error
    check_version(version or None, where)
    named = {name: ShardFile(name, int(shard["bytes"]), str(shard["xxh3_128"])) for name, shard in shards.items()}
    return IndexFile(name, table.replace_schema_metadata(None), named, replaces)
