"""Finds the rows in the store that belong to a run's samples.

The record names the rollouts acknowledged for each sample, one per turn. A session captured later from the answers
(`roentgen capture`: other layers, another model) is joined on the rollout key.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pandas as pd

from roentgen.runs.record import RunError
from roentgen.runs.sample import RolloutRef, Sample
from roentgen.store import Session


class RolloutLocator(Protocol):
    """The part of a run that locates its rollouts."""

    @property
    def record_path(self) -> Path:
        """The record that names the rollouts."""

    def session_uri(self, ref: RolloutRef) -> str:
        """Return the address of a rollout's session."""


@dataclass(frozen=True, eq=False)
class StoredRollouts:
    """Rollouts of samples within one session."""

    session: Session
    """The open session."""
    rollouts: pd.DataFrame
    """Rows of its index, one per rollout."""
    sample_ids: list[str]
    """The sample of each, in the same order."""
    turns: list[int]
    """The turn of each."""


@dataclass(frozen=True, eq=False)
class StoredSamples:
    """Samples whose activations are in one session."""

    session: Session
    """The open session."""
    rollouts: pd.DataFrame
    """Rows of its index, one per sample."""
    samples: tuple[Sample, ...]
    """The samples, in the same order."""


def find_rollouts(
    run: RolloutLocator,
    samples: Iterable[Sample],
    session: str | Path | None = None,
    *,
    first_turns: bool = False,
    columns: Sequence[str] | None = (),
) -> list[StoredRollouts]:
    """Find the rollouts of samples, in the order of samples and turns.

    Args:
        run: the run of the samples.
        samples: the samples.
        session: a session captured from the run's answers; the run's own if None.
        first_turns: True to return only the first rollout of each sample.
        columns: index columns to read in addition to those that locate rows; all if None.

    Returns:
        One part per session; empty if no sample has a rollout.

    Raises:
        RunError: if a session lacks rollouts that the record names.
        StoreError: if a session cannot be read.
    """
    kept = 1 if first_turns else None
    if session is None:
        return list(_recorded(run, samples, kept, columns))
    return _joined(Session.open(session), samples, kept, columns)


def _recorded(
    run: RolloutLocator, samples: Iterable[Sample], kept: int | None, columns: Sequence[str] | None
) -> Iterator[StoredRollouts]:
    by_session: dict[str, list[tuple[str, int, str]]] = defaultdict(list)
    for sample in samples:
        for ref in sorted(sample.rollouts, key=lambda ref: ref.turn)[:kept]:
            by_session[run.session_uri(ref)].append((sample.sample_id, ref.turn, ref.rollout_id))
    for uri, named in by_session.items():
        session = Session.open(uri)
        names, turns, ids = (list(column) for column in zip(*named, strict=True))
        # By id, not by key: the record names the acknowledged rollouts, and a later retry is not one of them.
        index = session.rollouts(ids=ids, columns=columns).set_index("rollout_id", drop=False)
        if missing := [rollout_id for rollout_id in ids if rollout_id not in index.index]:
            raise RunError(
                f"{session.uri} lacks {len(missing)} of the {len(ids)} rollouts that {run.record_path} names "
                f"(the first is {missing[0]}); was the session deleted or recreated?"
            )
        yield StoredRollouts(session, index.loc[ids].reset_index(drop=True), names, turns)


def _joined(
    session: Session, samples: Iterable[Sample], kept: int | None, columns: Sequence[str] | None
) -> list[StoredRollouts]:
    frame = session.rollouts(columns=columns)
    frame = frame[frame["config_hash"].notna()].sort_values("turn", kind="stable")
    places: dict[tuple[str, str, int], list[int]] = defaultdict(list)
    keys = zip(frame["config_hash"], frame["problem_id"], frame["epoch"].astype(int), strict=True)
    for place, identity in enumerate(keys):
        places[identity].append(place)
    named = [(sample.sample_id, place) for sample in samples for place in places.get(sample.identity, ())[:kept]]
    if not named:
        return []
    own = frame.iloc[[place for _, place in named]].reset_index(drop=True)
    return [StoredRollouts(session, own, [name for name, _ in named], own["turn"].astype(int).tolist())]
