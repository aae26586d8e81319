"""A run's samples as one parquet file, a row each, for whoever works in pandas, polars or DuckDB.

    roentgen export RUN samples.parquet

Each extractor has two columns, `answer_NAME` and `correct_NAME`; `correct` is the primary one's, and `verdict` tells a
wrong answer from none (correct, wrong, no_answer). Messages are JSON. A
sample's activations are found by its `rollout_ids`, one a turn, in the session at `session`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from eval_jobs.scoring import EXTRACTORS
from eval_jobs.summary import verdict
from roentgen.durable import atomic_write
from roentgen.runs import Run, Sample

ROWS_AT_ONCE = 1_000

SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("problem_id", pa.string()),
        ("epoch", pa.int32()),
        ("variant", pa.string()),
        ("config_hash", pa.string()),
        ("question", pa.string()),
        ("gold", pa.string()),
        ("messages", pa.string()),
        ("response", pa.string()),
        ("correct", pa.bool_()),
        ("verdict", pa.string()),
        *((f"answer_{name}", pa.string()) for name in EXTRACTORS),
        *((f"correct_{name}", pa.bool_()) for name in EXTRACTORS),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("cached_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("turns", pa.int32()),
        ("tool_calls", pa.int32()),
        ("seconds", pa.float64()),
        ("finished", pa.float64()),
        ("session", pa.string()),
        ("rollout_ids", pa.list_(pa.string())),
        ("error", pa.string()),
    ]
)
_AS_RECORDED = tuple(name for name in SCHEMA.names if name in Sample.model_fields)


def write_parquet(run: Run, path: Path) -> int:
    """Write a run's samples, in the order of their names; return how many.

    Raises:
        RunError: if the record is damaged.
        OSError: as the disk answers.
    """
    with atomic_write(path) as temporary, pq.ParquetWriter(temporary, SCHEMA) as writer:
        return sum(_write(writer, table) for table in read_tables(run))


def read_tables(run: Run) -> Iterator[pa.Table]:
    """Return a run's samples as tables of these columns, some at a time, in the order of their names.

    Raises:
        RunError: if the record is damaged.
    """
    samples = run.samples().by_name()
    for start in range(0, len(samples), ROWS_AT_ONCE):
        rows = [_row(run, sample) for sample in samples[start : start + ROWS_AT_ONCE]]
        yield pa.Table.from_pylist(rows, schema=SCHEMA)


def read_frame(run: Run) -> pd.DataFrame:
    """Return a run's samples as a table with the same columns, in the order of their names.

    Raises:
        RunError: if the record is damaged.
    """
    return pa.concat_tables([SCHEMA.empty_table(), *read_tables(run)]).to_pandas()


def _write(writer: pq.ParquetWriter, table: pa.Table) -> int:
    writer.write_table(table)
    return len(table)


def _row(run: Run, sample: Sample) -> dict[str, Any]:
    """Return a sample's columns; one that failed has no verdicts."""
    return {
        **{name: getattr(sample, name) for name in _AS_RECORDED},
        "messages": json.dumps(sample.messages, ensure_ascii=False),
        "correct": None if sample.error is not None else sample.correct,
        "verdict": verdict(sample, run.config.settings["extractor"]),
        **{f"answer_{name}": answer for name, answer in sample.answers.items()},
        **{f"correct_{name}": correct for name, correct in sample.correct_by.items()},
        "turns": len(sample.turns),
        "tool_calls": sum(turn.tool_calls for turn in sample.turns),
        "session": run.session_uri(sample.rollouts[0]) if sample.rollouts else None,
        "rollout_ids": [rollout.rollout_id for rollout in sample.rollouts],
    }
