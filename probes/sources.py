"""From a run or a session of the store to its examples, each with its row in the store's index.

A run's `samples.jsonl` says what each answer was worth and which rollout holds its activations; a session's index says what
was kept and with which labels. For a run, another session may be named (`roentgen capture` made it: other layers, another
model): it is joined on the key that both were made under. In a conversation of several turns the first turn's rollout
counts: it is where the model has seen the problem and nothing else.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from probes.errors import ProbeDataError
from probes.labels import Example
from roentgen.runs import Run, Sample
from roentgen.store import Session

Where = str | Path


@dataclass(frozen=True)
class Source:
    """The part of a dataset that lies in one session."""

    session: Session
    """The open session."""
    rollouts: pd.DataFrame
    """Rows of its index, one per example."""
    examples: tuple[Example, ...]
    """The examples, in the same order."""


def open_source(place: Where, session: Where | None) -> tuple[list[Source], int]:
    """Return a run's or a session's part of the dataset, and how many samples have no activations."""
    path = Path(str(place)).expanduser()
    if not (path / "config.json").exists() and ("://" in str(place) or (path / "session.json").exists()):
        opened = Session.open(place)
        frame = opened.rollouts()
        if len(frame) == 0:
            raise ProbeDataError(f"{place} holds no rollout")
        return [Source(opened, frame, tuple(_of_index(row) for row in frame.to_dict("records")))], 0
    run = Run.open(path)
    recorded = run.samples()
    answered = [sample for sample in recorded if sample.error is None]
    parts = _join(run, answered) if session is None else _join_session(run, session, answered)
    found = sum(len(part.examples) for part in parts)
    if not found:
        raise ProbeDataError(_nothing_to_join(run, len(recorded), session))
    return parts, len(recorded) - found


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
    """Return the question of an evaluation's sample: its last user message, without the examples shown before it.

    Of other rollouts it is not known which part of the prompt is the question.
    """
    spoken = [s for s in row["segments"] if s["role"] == "user" and s["stop"] <= end]
    return text[spoken[-1]["start"] : spoken[-1]["stop"]] if spoken and "sample_id" in row["labels"] else None


def _of_sample(run: Run, sample: Sample, row: pd.Series) -> Example:
    return Example(
        sample.problem_id, sample.epoch, row["rollout_id"], sample.prompt_tokens, sample.completion_tokens,
        sample.finish_reason == "length", sample.question, dict(row["labels"]), sample, run.config,
    )  # fmt: skip


def _source(run: Run, session: Session, rows: pd.DataFrame, samples: Sequence[Sample]) -> Source:
    examples = (_of_sample(run, sample, row) for sample, (_, row) in zip(samples, rows.iterrows(), strict=True))
    return Source(session, rows, tuple(examples))


def _join(run: Run, answered: list[Sample]) -> list[Source]:
    """Find the samples that kept activations, and each one's row of the store's index."""
    by_session = defaultdict(list)
    for sample in answered:
        if sample.rollouts:
            ref = min(sample.rollouts, key=lambda ref: ref.turn)
            by_session[run.session_uri(ref)].append((sample, ref.rollout_id))
    sources = []
    for uri, pairs in by_session.items():
        session = Session.open(uri)
        # By id, not by key: the record names the rollout that was acknowledged, and a later retry is not it.
        index = session.rollouts(ids=[rollout_id for _, rollout_id in pairs]).set_index("rollout_id", drop=False)
        missing = [rollout_id for _, rollout_id in pairs if rollout_id not in index.index]
        if missing:
            raise ProbeDataError(
                f"{session.uri} lacks {len(missing)} of the {len(pairs)} rollouts that {run.record_path} names "
                f"(the first is {missing[0]}); was the session deleted or made anew?"
            )
        rows = index.loc[[rollout_id for _, rollout_id in pairs]]
        sources.append(_source(run, session, rows, [sample for sample, _ in pairs]))
    return sources


def _join_session(run: Run, uri: Where, answered: list[Sample]) -> list[Source]:
    """Find the samples that a session has a rollout of, and its row; a sample's first turn counts."""
    session = Session.open(uri)
    frame = session.rollouts()
    frame = frame[frame["config_hash"].notna()].sort_values("turn", ascending=False)
    identities = zip(frame["config_hash"], frame["problem_id"], frame["epoch"].astype(int), strict=True)
    place = {identity: number for number, identity in enumerate(identities)}
    samples = [sample for sample in answered if sample.identity in place]
    return [_source(run, session, frame.iloc[[place[sample.identity] for sample in samples]], samples)]


def _nothing_to_join(run: Run, recorded: int, session: Where | None) -> str:
    if session is None:
        return (
            f"{run.path} has no activations: none of its {recorded} samples names a rollout; "
            "evaluate again with activations kept"
        )
    return (
        f"{session} holds none of the {recorded} samples of {run.path}: no rollout in it has the key of one; "
        f"`roentgen capture {run.path}` makes a session that does"
    )
