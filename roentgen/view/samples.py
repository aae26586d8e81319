"""One sample: what the record says of it, where its rows are, and the Python that reads them."""

import re
from typing import Any

from roentgen.runs import Sample
from roentgen.store import StoreError
from roentgen.store.schema import read_labels
from roentgen.view.errors import ViewError
from roentgen.view.schemas import Extracted, OneSample, SampleInfo, StoredTurn
from roentgen.view.sources import OpenRun, OpenSession, OpenSource, StoredRollout
from roentgen.view.values import choices_of

_PYTHON = """from roentgen.store import Session

session = Session.open({uri!r})
where = session.rollouts(ids=[{rollout_id!r}])
(item,) = session.activations({key!r}, where=where)
item.values, item.position  # {rows} rows, and the token that each is of
"""


def one_sample(source: OpenSource, sample_id: str, where: str = "", sort: str = "", q: str = "") -> OneSample:
    """Return a sample, and its neighbors among those that match.

    Raises:
        ViewError: 404 if there is none.
    """
    if isinstance(source, OpenRun):
        place, sample = source.sample(sample_id)
        info = _recorded(sample, source.run.config.extractor)
        turns = sorted({ref.turn for ref in sample.rollouts})
        kept = {ref.turn: ref.rollout_id for ref in sample.rollouts}
    else:
        assert isinstance(source, OpenSession)
        place = source.place_of(sample_id)
        row = source.rollout(sample_id, 0).row
        info = _stored(row)
        turns, kept = [int(row["turn"] or 0)], {int(row["turn"] or 0): sample_id}
    rollouts: list[StoredTurn] = []
    python = ""
    for turn in turns:
        try:
            rollout = source.rollout(sample_id, turn)
            rollouts.append(_turn(source, rollout, turn))
        except (ViewError, StoreError):
            lost: StoredTurn = {
                "turn": turn, "rollout_id": kept[turn], "n_prompt": None, "n_completion": None, "keys": [], "stored": False,
                "values": [],
            }  # fmt: skip
            rollouts.append(lost)
            continue
        python = python or _code(rollout)
    previous, following = source.table.neighbors(place, where, sort, q)
    return {"sample": info, "rollouts": rollouts, "python": python, "previous": previous, "next": following}


def _recorded(sample: Sample, extractor: str | None) -> SampleInfo:
    return {
        "sample_id": sample.sample_id,
        "problem": sample.problem_id,
        "epoch": sample.epoch,
        "variant": sample.variant,
        "question": sample.question,
        "solution": sample.solution,
        "gold": sample.gold,
        "answers": sample.answers,
        "correct_by": sample.correct_by,
        "verdict": "failed" if sample.error is not None else sample.verdict(extractor),
        "values": dict(sample.values),
        "labels": sample.fields,
        "error": sample.error,
        "finish_reason": sample.finish_reason,
        "response": sample.response,
        "messages": sample.messages,
        "turns": [turn.model_dump(mode="json") for turn in sample.turns],
        "extracted": [_marked(name, read, sample) for name, read in sample.answers.items()],
    }


def _marked(extractor: str, read: str | None, sample: Sample) -> Extracted:
    """Find in the response what an extractor read: its last occurrence that is not part of a longer number or word."""
    found: Extracted = {
        "extractor": extractor, "read": read, "start": None, "stop": None, "verdict": sample.verdict(extractor),
    }  # fmt: skip
    if read:
        inside = r"(?<![\w.])" + re.escape(read.rstrip(".")) + r"(?!\w|[.,]\d)"
        for match in re.finditer(inside, sample.response):
            found["start"], found["stop"] = match.span()
    return found


def _stored(row: dict[str, Any]) -> SampleInfo:
    text = row["text"]
    messages = [{"role": one["role"], "content": text[one["start"] : one["stop"]]} for one in row["segments"]]
    return {
        "sample_id": row["rollout_id"], "problem": row["problem_id"], "epoch": row["epoch"], "variant": None, "question": None,
        "solution": None, "gold": None, "answers": {}, "correct_by": {}, "verdict": None, "values": {},
        "labels": read_labels(row["labels"]), "error": None, "finish_reason": row["finish_reason"],
        "response": messages[-1]["content"] if messages else text, "messages": messages, "turns": [], "extracted": [],
    }  # fmt: skip


def _turn(source: OpenSource, rollout: StoredRollout, turn: int) -> StoredTurn:
    row = rollout.place
    return {
        "turn": turn,
        "rollout_id": row["rollout_id"],
        "n_prompt": row["n_prompt"],
        "n_completion": row["n_completion"],
        "keys": list(rollout.keys),
        "stored": True,
        "values": choices_of(source, rollout),
    }


def _code(rollout: StoredRollout) -> str:
    row = rollout.place
    return _PYTHON.format(
        uri=rollout.session.uri,
        rollout_id=row["rollout_id"],
        key=rollout.keys[0],
        rows=row["row_stop"] - row["row_start"],
    )
