"""A run's samples as one parquet file: the table of `roentgen.runs.table`, written some rows at a time.

roentgen export RUN samples.parquet
"""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from roentgen.atomic_files import atomic_write
from roentgen.runs import Run
from roentgen.runs.table import extractors_of, row_of, schema_of

ROWS_AT_ONCE = 1_000


def write_parquet(run: Run, path: Path) -> int:
    """Write a run's samples, sorted by name; return their number.

    Raises:
        RunError: if the record is damaged.
        OSError: if the file cannot be written.
    """
    schema = schema_of_run(run)
    with atomic_write(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        return sum(_write(writer, table) for table in read_tables(run, schema))


def schema_of_run(run: Run) -> pa.Schema:
    """Return the columns of a run's samples.

    Raises:
        RunError: if the record is damaged.
    """
    return schema_of(extractors_of(run.read_samples()))


def read_tables(run: Run, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield a run's samples as tables of these columns, some rows at a time, sorted by name.

    Raises:
        RunError: if the record is damaged.
    """
    samples = run.read_samples().by_name()
    for start in range(0, len(samples), ROWS_AT_ONCE):
        chosen = samples[start : start + ROWS_AT_ONCE]
        rows = [row_of(sample, run.config.extractor, run.session_uri) for sample in chosen]
        yield pa.Table.from_pylist(rows, schema=schema)


def _write(writer: pq.ParquetWriter, table: pa.Table) -> int:
    writer.write_table(table)
    return len(table)
