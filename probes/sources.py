"""Converts runs and sessions to examples, each with its row of the store's index.

A run's `samples.jsonl` has the verdict of each answer and the id of its rollout; a session's index has the stored keys and
labels. For a run, another session may be given (made by `roentgen capture`: other layers, another model); it is joined on
the rollout key. In a conversation of several turns, the first turn's rollout is used: there the model has seen only the
problem.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from probes.errors import ProbeDataError
from probes.labels import Example
from roentgen.runs import Run, Sample
from roentgen.runs.stored import StoredSamples
from roentgen.store import Session

SourcePath = str | Path


@dataclass(frozen=True)
class SessionExamples:
    """The part of a dataset within one session."""

    session: Session
    """The open session."""
    rollouts: pd.DataFrame
    """Rows of its index, one per example."""
    examples: tuple[Example, ...]
    """The examples, in the same order."""


def open_source(place: SourcePath, session: SourcePath | None) -> tuple[list[SessionExamples], int]:
    """Return a run's or a session's parts of the dataset, and the number of samples without activations.

    Raises:
        ProbeDataError: if a session is empty.
        RunError: if no sample of a run has activations, or the store lacks some.
        StoreError: if a session cannot be read.
    """
    path = Path(str(place)).expanduser()
    if not (path / "config.json").exists() and ("://" in str(place) or (path / "session.json").exists()):
        opened = Session.open(place)
        frame = opened.rollouts()
        if len(frame) == 0:
            raise ProbeDataError(f"{place} holds no rollouts")
        return [SessionExamples(opened, frame, tuple(_of_index(row) for row in frame.to_dict("records")))], 0
    run = Run(path)
    parts = [_of_run(run, part) for part in run.stored(session=session)]
    return parts, len(run.read_samples()) - sum(len(part.examples) for part in parts)


def _of_index(row: dict[Hashable, Any]) -> Example:
    n_prompt, offsets, text = int(row["n_prompt"]), row["token_offsets"], str(row["text"])
    end = int(offsets[n_prompt]) if len(offsets) > n_prompt else len(text)
    problem = row["problem_id"] if isinstance(row["problem_id"], str) else row["rollout_id"]
    epoch = 1 if pd.isna(row["epoch"]) else int(row["epoch"])
    return Example(
        str(problem), epoch, str(row["rollout_id"]), n_prompt, int(row["n_completion"]),
        row["finish_reason"] == "length", text[:end], dict(row["labels"]), asked=_asked(row, text, end),
    )  # fmt: skip


def _asked(row: dict[Hashable, Any], text: str, end: int) -> str | None:
    """Return the question of an evaluation's sample: its last user message, without the shots before it.

    For other rollouts it is unknown which part of the prompt is the question.
    """
    spoken = [s for s in row["segments"] if s["role"] == "user" and s["stop"] <= end]
    return text[spoken[-1]["start"] : spoken[-1]["stop"]] if spoken and "sample_id" in row["labels"] else None


def _of_run(run: Run, part: StoredSamples) -> SessionExamples:
    rows = part.rollouts.iterrows()
    examples = (_of_sample(run, sample, row) for sample, (_, row) in zip(part.samples, rows, strict=True))
    return SessionExamples(part.session, part.rollouts, tuple(examples))


def _of_sample(run: Run, sample: Sample, row: pd.Series) -> Example:
    return Example(
        sample.problem_id, sample.epoch, row["rollout_id"], sample.prompt_tokens, sample.completion_tokens,
        sample.finish_reason == "length", sample.question, dict(row["labels"]), sample, run.config,
    )  # fmt: skip
