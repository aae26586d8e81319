"""Which rows of the store a run's samples have.

The record says which rollout was acknowledged for a sample; a session that was captured of the answers later (`roentgen
capture`: other layers, another model) is joined on the key that both were made under.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from roentgen.runs.record import RunError
from roentgen.runs.sample import RolloutRef, Sample
from roentgen.store import Session


@dataclass(frozen=True, eq=False)
class StoredSamples:
    """Samples whose activations lie in one session."""

    session: Session
    """The open session."""
    rollouts: pd.DataFrame
    """Rows of its index, one per sample."""
    samples: tuple[Sample, ...]
    """The samples, in the same order."""


def find_own(answered: Sequence[Sample], session_uri: Callable[[RolloutRef], str], record: Path) -> list[StoredSamples]:
    """Find the samples that kept activations, and each one's row of the store's index.

    Args:
        answered: samples.
        session_uri: says where a rollout's session is.
        record: the file that names the rollouts, for an error's message.

    Raises:
        RunError: if a session has lost some of them.
        StoreError: if a session cannot be read.
    """
    by_session = defaultdict(list)
    for sample in answered:
        if sample.rollouts:
            ref = min(sample.rollouts, key=lambda ref: ref.turn)
            by_session[session_uri(ref)].append((sample, ref.rollout_id))
    parts = []
    for uri, pairs in by_session.items():
        session = Session.open(uri)
        # By id, not by key: the record names the rollout that was acknowledged, and a later retry is not it.
        index = session.rollouts(ids=[rollout_id for _, rollout_id in pairs]).set_index("rollout_id", drop=False)
        missing = [rollout_id for _, rollout_id in pairs if rollout_id not in index.index]
        if missing:
            raise RunError(
                f"{session.uri} lacks {len(missing)} of the {len(pairs)} rollouts that {record} names "
                f"(the first is {missing[0]}); was the session deleted or made anew?"
            )
        rows = index.loc[[rollout_id for _, rollout_id in pairs]]
        parts.append(StoredSamples(session, rows, tuple(sample for sample, _ in pairs)))
    return parts


def find_in(uri: str | Path, answered: Sequence[Sample]) -> list[StoredSamples]:
    """Find the samples that a session has a rollout of, and its row; a sample's first turn counts.

    Raises:
        StoreError: if the session cannot be read.
    """
    session = Session.open(uri)
    frame = session.rollouts()
    frame = frame[frame["config_hash"].notna()].sort_values("turn", ascending=False)
    identities = zip(frame["config_hash"], frame["problem_id"], frame["epoch"].astype(int), strict=True)
    place = {identity: number for number, identity in enumerate(identities)}
    samples = tuple(sample for sample in answered if sample.identity in place)
    return [StoredSamples(session, frame.iloc[[place[sample.identity] for sample in samples]], samples)]
