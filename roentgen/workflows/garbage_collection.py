"""`roentgen sessions gc`: removes files that no reader uses and, given the session's runs, rollouts that no run references.

A killed evaluation may leave rollouts that are stored but not recorded; when it continues, it asks their problems again. Only
the runs know which rollouts these are, so they must be given. Rollouts of other configurations are kept.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ulid import ULID

from roentgen.runs import Run
from roentgen.store import Session
from roentgen.store.merging import compact, remove_unused


@dataclass(frozen=True)
class Removed:
    """The result: number of removed rollouts, removed files, and their size."""

    dropped: int = 0
    files: list[str] = field(default_factory=list)
    size: int = 0


def collect_garbage(uri: str, runs: Sequence[Path], *, older_than_s: float, dry_run: bool = False) -> Removed:
    """Remove unused files and rollouts from a session.

    Args:
        uri: the session's address.
        runs: run directories; rollouts of their configurations that they do not reference are removed.
        older_than_s: keep files and rollouts younger than this, in seconds.
        dry_run: only return what would be removed.

    Raises:
        StoreError: if the session cannot be read, or is damaged.
        RunError: if a run cannot be read.
        OSError: if a file cannot be removed.
    """
    session, opened = Session.open(uri), [Run(run) for run in runs]
    named = {ref.rollout_id for run in opened for sample in run.read_samples() for ref in sample.rollouts}
    hashes = {config_hash for run in opened for config_hash in run.config.config_hashes}
    unwanted: list[str] = []
    if runs:
        frame = session.rollouts(unique=False, columns=())
        # A ULID starts with its time, so it sorts by time.
        old = frame["rollout_id"] < str(ULID.from_timestamp(time.time() - older_than_s))
        of_these = frame["config_hash"].isin(hashes) & ~frame["rollout_id"].isin(named)
        unwanted = frame.loc[old & of_these, "rollout_id"].tolist()
    if unwanted and not dry_run:
        compact(session, drop=unwanted)
    gone = remove_unused(session, grace_s=older_than_s, dry_run=dry_run)
    return Removed(len(unwanted), gone.files, gone.size)
