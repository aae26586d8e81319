"""Tidies a session: what no reader wants goes, and, against the runs it belongs to, what no run names.

A rollout that was stored but never recorded was acknowledged to nobody who lived to write it down: its evaluation was killed,
and its problem posed again. Only the runs know which those are, so they must be named; rollouts of other configurations stay.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ulid import ULID

from roentgen.runs import Run
from roentgen.store import Session
from roentgen.store.merging import collect, compact


@dataclass(frozen=True)
class Tidied:
    """What went: rollouts that no run names, and files with their bytes."""

    dropped: int = 0
    files: list[str] = field(default_factory=list)
    size: int = 0


def tidy(uri: str, runs: Sequence[Path], *, older_than_s: float, dry_run: bool = False) -> Tidied:
    """Remove from a session what is not wanted.

    Args:
        uri: the session's address.
        runs: run directories: of their configurations, only rollouts that they name stay.
        older_than_s: leave what is younger than this, in seconds.
        dry_run: only say what would go.

    Raises:
        StoreError: if the session cannot be read, or is damaged.
        RunError: if a run cannot be read.
        OSError: as the disk or the bucket answers.
    """
    session, opened = Session.open(uri), [Run.open(run) for run in runs]
    named = {ref.rollout_id for run in opened for sample in run.samples() for ref in sample.rollouts}
    hashes = {config_hash for run in opened for config_hash in run.config.config_hashes}
    unwanted: list[str] = []
    if runs:
        frame = session.rollouts(unique=False, columns=())
        # A ULID begins with its time, and sorts by it.
        old = frame["rollout_id"] < str(ULID.from_timestamp(time.time() - older_than_s))
        of_these = frame["config_hash"].isin(hashes) & ~frame["rollout_id"].isin(named)
        unwanted = frame.loc[old & of_these, "rollout_id"].tolist()
    if unwanted and not dry_run:
        compact(session, drop=unwanted)
    gone = collect(session, grace_s=older_than_s, dry_run=dry_run)
    return Tidied(len(unwanted), gone.files, gone.size)
