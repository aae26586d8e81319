"""Writes the tables of an exported run: samples, rollouts, and one table of rows per stored key.

    samples/00000.parquet             a row per sample, as in `roentgen export RUN x.parquet`
    rollouts/00000.parquet            a row per rollout (of a conversation, per turn): text, tokens, verdict, labels
    layers.12.resid_post/00000.parquet   a row per token: its rollout, its position, and `values`, its activation

A row of a key's table is one token, which suits most readers: a filter on `position` selects the rows for a linear probe, a
shuffle yields training data for a sparse autoencoder, and no cell is larger than a vector. Values are float32, which
holds every stored dtype exactly; their bytes are grouped by significance (parquet's BYTE_STREAM_SPLIT), so the zero halves of
bfloat16 values take next to nothing in the file.

Tables are written some megabytes at a time. The rollouts' table is written first, because the tables of rows take each token's
text from it.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int, Shaped

from eval_jobs.parquet_export import read_tables, schema_of_run
from roentgen.runs import Run, Sample
from roentgen.runs.stored import StoredRollouts
from roentgen.store import StoreError
from roentgen.tokenized_text import token_texts

FILE_BYTES = 512 << 20
"""Approximate size of a file before compression."""
GROUP_BYTES = 32 << 20
"""Size of the rows that are written together."""
ROLLOUTS_AT_ONCE = 500

_JUDGED = [
    ("sample_id", pa.string()),
    ("problem_id", pa.string()),
    ("epoch", pa.int32()),
    ("variant", pa.string()),
    ("turn", pa.int32()),
    ("rollout_id", pa.string()),
    ("correct", pa.bool_()),
    ("verdict", pa.string()),
]

ROLLOUTS = pa.schema(
    [
        *_JUDGED,
        ("gold", pa.string()),
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("tokens", pa.list_(pa.string())),
        ("segments", pa.list_(pa.struct([("role", pa.string()), ("start", pa.int32()), ("stop", pa.int32())]))),
        ("n_prompt", pa.int32()),
        ("n_completion", pa.int32()),
        ("finish_reason", pa.string()),
        ("final_logprob", pa.float32()),
        ("labels", pa.string()),
        ("session", pa.string()),
        ("model", pa.string()),
        ("revision", pa.string()),
        ("keys", pa.list_(pa.string())),
        ("positions", pa.string()),
        ("dtype", pa.string()),
        ("computed_in", pa.string()),
    ]
)

_DESCRIBED = [
    *_JUDGED,
    ("position", pa.int32()),
    ("token_id", pa.int32()),
    ("token", pa.string()),
    ("generated", pa.bool_()),
    ("logprob", pa.float32()),
]

_AS_STORED = (
    "rollout_id",
    "token_ids",
    "segments",
    "text",
    "n_prompt",
    "n_completion",
    "finish_reason",
    "final_logprob",
)


@dataclass(frozen=True)
class Judged:
    """A sample's columns in the tables of rollouts and rows."""

    sample_id: str
    problem_id: str
    epoch: int
    variant: str | None
    gold: str
    correct: bool | None
    """None for a failed sample."""
    verdict: str | None
    """The primary extractor's verdict."""

    @classmethod
    def of(cls, sample: Sample, extractor: str) -> Self:
        """Take it from a sample.

        Args:
            sample: which.
            extractor: the primary one.
        """
        return cls(
            sample_id=sample.sample_id,
            problem_id=sample.problem_id,
            epoch=sample.epoch,
            variant=sample.variant,
            gold=sample.gold,
            correct=None if sample.error is not None else sample.correct,
            verdict=sample.verdict(extractor),
        )


@dataclass(frozen=True)
class Table:
    """A written table."""

    name: str
    """Name of its folder, by which it is loaded."""
    rows: int
    """Number of rows."""
    nbytes: int
    """Size of its files in bytes."""
    width: int = 0
    """Length of `values` in a key's table."""


class _Files:
    """The parquet files of one table: 00000.parquet and so on."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        folder.mkdir()
        self._folder, self._schema = folder, schema
        self._writer: pq.ParquetWriter | None = None
        self._in_file = self._count = self.rows = 0
        # Activations do not repeat: a dictionary of them would only cost.
        values = [name for name in schema.names if name == "values"]
        self._options: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
        if values:
            self._options["use_byte_stream_split"] = ["values.list.element"]
            self._options["use_dictionary"] = [name for name in schema.names if name != "values"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is None and kind is None:  # a table without rows has its columns nevertheless
            self.write(self._schema.empty_table())
        self._close()

    def write(self, table: pa.Table) -> None:
        if self._writer is None:
            path = self._folder / f"{self._count:05}.parquet"
            self._writer = pq.ParquetWriter(path, self._schema, **self._options)
            self._count += 1
        self._writer.write_table(table)
        self.rows += len(table)
        self._in_file += table.nbytes
        if self._in_file >= FILE_BYTES:
            self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer, self._in_file = None, 0

    def table(self, width: int = 0) -> Table:
        """Return the written table, once it is closed."""
        nbytes = sum(path.stat().st_size for path in self._folder.iterdir())
        return Table(self._folder.name, self.rows, nbytes, width)


def write_samples(run: Run, folder: Path) -> Table:
    """Write the table of samples; sessions are named without the path of their store."""
    schema = schema_of_run(run)
    with _Files(folder / "samples", schema) as files:
        for table in read_tables(run, schema):
            place = table.column_names.index("session")
            names = [uri and uri.rstrip("/").rsplit("/", 1)[-1] for uri in table.column(place).to_pylist()]
            files.write(table.set_column(place, "session", pa.array(names, pa.string())))
    return files.table()


def write_rollouts(parts: Sequence[StoredRollouts], judged: Mapping[str, Judged], folder: Path) -> Table:
    """Write the table of rollouts, one session after another.

    Args:
        parts: the rollouts.
        judged: what is said of each sample, by name.
        folder: where to.

    Raises:
        StoreError: if a session cannot be read.
    """
    with _Files(folder / "rollouts", ROLLOUTS) as files:
        for part in parts:
            for start in range(0, len(part.rollouts), ROLLOUTS_AT_ONCE):
                rows = _rollouts(part, slice(start, start + ROLLOUTS_AT_ONCE), judged)
                files.write(pa.Table.from_pylist(rows, schema=ROLLOUTS))
    return files.table()


def _rollouts(part: StoredRollouts, chosen: slice, judged: Mapping[str, Judged]) -> list[dict[str, Any]]:
    ids = part.rollouts["rollout_id"].iloc[chosen].tolist()
    index = {row["rollout_id"]: row for row in part.session.rollouts(ids=ids).to_dict("records")}
    found = []
    for rollout_id, sample_id, turn in zip(ids, part.sample_ids[chosen], part.turns[chosen], strict=True):
        row = index[rollout_id]
        spec = part.session.spec(row["shard"])
        found.append({
            **asdict(judged[sample_id]),
            **{name: row[name] for name in _AS_STORED},
            **spec.model_dump(include={"model", "revision", "positions", "dtype", "computed_in"}),
            "turn": turn,
            "tokens": token_texts(row["text"], row["token_offsets"]),
            "labels": json.dumps(row["labels"], ensure_ascii=False),
            "session": part.session.name,
            "keys": list(spec.keys),
        })  # fmt: skip
    return found


def write_rows(parts: Sequence[StoredRollouts], key: str, folder: Path) -> Table:
    """Write the table of one key's rows, in the order of the rollouts' table, which is there already.

    Raises:
        StoreError: if rows cannot be read, or are not all of one width.
    """
    width = _width(parts, key)
    schema = pa.schema([*_DESCRIBED, ("values", pa.list_(pa.float32(), width))])
    pending: list[_RowBatch] = []
    size = 0
    with _Files(folder / key, schema) as files:
        for rows in _read_rows(parts, key, folder):
            pending.append(rows)
            size += rows.values.nbytes
            if size >= GROUP_BYTES:
                files.write(_table(pending, schema))
                pending, size = [], 0
        if pending:
            files.write(_table(pending, schema))
    return files.table(width)


@dataclass(frozen=True)
class _RowBatch:
    """One rollout's rows of a stored key."""

    rollout: dict[str, Any]
    """The rollout's row in the rollouts' table."""
    position: Int[np.ndarray, "rows"]
    columns: dict[str, Shaped[np.ndarray, "rows"]]
    """What the store says of each row."""
    values: Float[np.ndarray, "rows d"]


def _width(parts: Sequence[StoredRollouts], key: str) -> int:
    widths = {
        math.prod(shape)
        for part in parts
        for shard in part.rollouts["shard"].unique()
        for name, _, shape in part.session.shard(str(shard)).layout
        if name == key
    }
    if len(widths) > 1:
        raise StoreError(
            f"{key} has rows of {' and of '.join(map(str, sorted(widths)))} values: the run's sessions are of different "
            "models; export one of them (--session)"
        )
    return widths.pop()


def _read_rows(parts: Sequence[StoredRollouts], key: str, folder: Path) -> Iterator[_RowBatch]:
    rollouts = _read_rollouts(folder)
    for part in parts:
        has = [key in part.session.spec(str(shard)).keys for shard in part.rollouts["shard"]]
        items = iter(part.session.activations(key, where=part.rollouts[has]))
        places = part.rollouts[["shard", "row_start", "row_stop"]].itertuples(index=False, name=None)
        for there, (name, start, stop) in zip(has, places, strict=True):
            rollout = next(rollouts)
            if not there or start == stop:
                if there:
                    next(items)
                continue
            item, shard = next(items), part.session.shard(name)
            columns = {column: shard.column(column)[start:stop] for column in ("token_id", "generated", "logprob")}
            yield _RowBatch(rollout, item.position, columns, item.values.float().flatten(1).numpy())


def _read_rollouts(folder: Path) -> Iterator[dict[str, Any]]:
    names = [*(name for name, _ in _JUDGED), "tokens"]
    for path in sorted((folder / "rollouts").iterdir()):
        for batch in pq.ParquetFile(path).iter_batches(ROLLOUTS_AT_ONCE, columns=names):
            yield from batch.to_pylist()


def _table(rows: Sequence[_RowBatch], schema: pa.Schema) -> pa.Table:
    counts = [len(one.position) for one in rows]
    position = np.concatenate([one.position for one in rows])
    pooled = position < 0
    columns = {name: np.concatenate([one.columns[name] for one in rows]) for name in rows[0].columns}
    texts = [one.rollout["tokens"][at] if at >= 0 else None for one in rows for at in one.position.tolist()]
    flat = pa.array(np.concatenate([one.values for one in rows]).reshape(-1))
    found: list[pa.Array] = []
    for field in schema:
        match field.name:
            case "values":
                found.append(pa.FixedSizeListArray.from_arrays(flat, field.type.list_size))
            case "position":
                found.append(pa.array(position, field.type))
            case "token":
                found.append(pa.array(texts, field.type))
            case "token_id" | "generated" | "logprob":
                column = columns[field.name]
                unknown = pooled | np.isnan(column) if field.name == "logprob" else pooled
                found.append(pa.array(column.astype(field.type.to_pandas_dtype()), field.type, mask=unknown))
            case name:
                own = pa.array([one.rollout[name] for one in rows], field.type)
                found.append(own.take(pa.array(np.repeat(np.arange(len(rows)), counts))))
    return pa.Table.from_arrays(found, schema=schema)
