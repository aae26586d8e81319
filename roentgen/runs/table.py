"""A run's samples as a table, one row each, for pandas, polars or DuckDB.

Each extractor in the record has two columns, `answer_NAME` and `correct_NAME`. `correct` is the primary one's, and
`verdict` distinguishes wrong answers from missing ones (correct, wrong, no_answer). Messages, the additional `fields` of
the problem and the `values` of scorers are JSON. A sample's activations are the `rollout_ids`, one per turn, in the session
at `session`.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any

import pandas as pd
import pyarrow as pa

from roentgen.runs.sample import RolloutRef, Sample

_BEFORE = [
    ("sample_id", pa.string()),
    ("problem_id", pa.string()),
    ("epoch", pa.int32()),
    ("variant", pa.string()),
    ("config_hash", pa.string()),
    ("question", pa.string()),
    ("gold", pa.string()),
    ("fields", pa.string()),
    ("messages", pa.string()),
    ("response", pa.string()),
    ("correct", pa.bool_()),
    ("verdict", pa.string()),
]
_AFTER = [
    ("values", pa.string()),
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
_SPELLED = ("fields", "messages", "values")
_AS_RECORDED = tuple(name for name, _ in [*_BEFORE, *_AFTER] if name in Sample.model_fields)


def extractors_of(samples: Iterable[Sample]) -> list[str]:
    """Return all extractors that have judged a sample, in the order of the record."""
    return list(dict.fromkeys(name for sample in samples for name in sample.correct_by))


def schema_of(extractors: Iterable[str]) -> pa.Schema:
    """Return the table's columns."""
    names = list(extractors)
    answers = [(f"answer_{name}", pa.string()) for name in names]
    return pa.schema([*_BEFORE, *answers, *((f"correct_{name}", pa.bool_()) for name in names), *_AFTER])


def row_of(sample: Sample, extractor: str | None, session_uri: Callable[[RolloutRef], str]) -> dict[str, Any]:
    """Return a sample's row; a failed sample has no verdicts.

    Args:
        sample: the sample.
        extractor: the primary extractor.
        session_uri: returns the address of a rollout's session.
    """
    return {
        **{name: getattr(sample, name) for name in _AS_RECORDED},
        **{name: json.dumps(getattr(sample, name), ensure_ascii=False) for name in _SPELLED},
        "correct": None if sample.error is not None else sample.correct,
        "verdict": sample.verdict(extractor),
        **{f"answer_{name}": answer for name, answer in sample.answers.items()},
        **{f"correct_{name}": correct for name, correct in sample.correct_by.items()},
        "turns": len(sample.turns),
        "tool_calls": sum(turn.tool_calls for turn in sample.turns),
        "session": session_uri(sample.rollouts[0]) if sample.rollouts else None,
        "rollout_ids": [rollout.rollout_id for rollout in sample.rollouts],
    }


def frame_of(
    samples: Iterable[Sample], extractor: str | None, session_uri: Callable[[RolloutRef], str]
) -> pd.DataFrame:
    """Return samples as a table in their order; the arguments are those of `row_of`."""
    found = list(samples)
    rows = [row_of(sample, extractor, session_uri) for sample in found]
    table: pd.DataFrame = pa.Table.from_pylist(rows, schema=schema_of(extractors_of(found))).to_pandas()
    return table
