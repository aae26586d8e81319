"""Which stored rollouts belong to a run's samples: every turn of every sample, where `Run.stored` takes the first turns.

The record names the rollouts that were acknowledged. Another session, which `roentgen capture` made of the run's answers, is
joined on the key that both were made under.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from roentgen.runs import Run, Sample
from roentgen.store import Session, StoreError


@dataclass(frozen=True)
class SampleRollouts:
    """The rollouts of some samples that lie in one session."""

    session: Session
    """The open session."""
    rollouts: pd.DataFrame
    """Where their rows are: rows of its index, one per rollout."""
    sample_ids: list[str]
    """The sample of each, in the same order."""
    turns: list[int]
    """The turn of each."""


def find_rollouts(run: Run, samples: Iterable[Sample], session: str | Path | None = None) -> list[SampleRollouts]:
    """Find the rollouts of samples, in the order of the samples and their turns.

    Args:
        run: whose samples they are.
        samples: the samples.
        session: a session that was captured of the run's answers; the run's own if None.

    Returns:
        A part per session; none if no sample has a rollout.

    Raises:
        StoreError: if a session cannot be read, or lacks a rollout that the record names.
    """
    return _recorded(run, samples) if session is None else _joined(Session.open(session), samples)


def _recorded(run: Run, samples: Iterable[Sample]) -> list[SampleRollouts]:
    by_session: dict[str, list[tuple[str, int, str]]] = defaultdict(list)
    for sample in samples:
        for ref in sorted(sample.rollouts, key=lambda ref: ref.turn):
            by_session[run.session_uri(ref)].append((sample.sample_id, ref.turn, ref.rollout_id))
    found = []
    for uri, named in by_session.items():
        session = Session.open(uri)
        ids = [rollout_id for _, _, rollout_id in named]
        index = session.rollouts(ids=ids, columns=()).set_index("rollout_id", drop=False)
        missing = [rollout_id for rollout_id in ids if rollout_id not in index.index]
        if missing:
            raise StoreError(
                f"{uri} lacks {len(missing)} of the {len(ids)} rollouts that {run.record_path} names (the first is "
                f"{missing[0]}); was the session deleted or made anew?"
            )
        frame = index.loc[ids].reset_index(drop=True)
        found.append(SampleRollouts(session, frame, [name for name, _, _ in named], [turn for _, turn, _ in named]))
    return found


def _joined(session: Session, samples: Iterable[Sample]) -> list[SampleRollouts]:
    frame = session.rollouts(columns=())
    frame = frame[frame["config_hash"].notna()].sort_values("turn", kind="stable")
    places: dict[tuple[str, str, int], list[int]] = defaultdict(list)
    for place, identity in enumerate(
        zip(frame["config_hash"], frame["problem_id"], frame["epoch"].astype(int), strict=True)
    ):
        places[identity].append(place)
    named = [(sample.sample_id, place) for sample in samples for place in places.get(sample.identity, ())]
    if not named:
        return []
    own = frame.iloc[[place for _, place in named]].reset_index(drop=True)
    return [SampleRollouts(session, own, [name for name, _ in named], own["turn"].astype(int).tolist())]
