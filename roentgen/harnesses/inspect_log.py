"""Reads inspect_ai's logs: each sample's scores, and the rollouts of its model calls.

The provider `roentgen/…` adds a reference to every output's metadata. Calls of other providers are identified by the
conversation that they sent to an address `/v1/r/RUN/-/1`.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

from roentgen.contract import LabelValue, canonical_hash
from roentgen.harnesses.scored import LogError, ScoredSample, flat_labels

if TYPE_CHECKING:
    from inspect_ai.log import EvalSample

REFERENCE = "roentgen"
"""Key of the reference in an output's metadata."""

_STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d[-:]\d\d[-:]\d\d")
"""Start of a log's file name."""


def read_inspect(log: Path) -> Iterator[ScoredSample]:
    """Yield a log's samples, one in memory at a time.

    Raises:
        LogError: if inspect_ai is not installed, or it cannot read the log.
    """
    try:
        from inspect_ai.log import read_eval_log_samples
    except ImportError as error:
        raise LogError(f"{log}: reading it requires inspect_ai; pip install 'roentgen-activations[inspect]'") from error
    try:
        for sample in read_eval_log_samples(str(log), all_samples_required=False):
            yield scored_sample(sample)
    except (OSError, ValueError, KeyError, EOFError) as error:
        if log.suffix == ".eval" and not is_zipfile(log):
            raise LogError(
                f"{log}: inspect_ai cannot read this log, because it is empty, truncated, or not an .eval file"
            ) from error
        raise LogError(f"{log}: inspect_ai cannot read this log: {' '.join(str(error).split())}") from error


def inspect_files(log: Path) -> list[Path]:
    """Return the logs in a folder: `.eval` files, and `.json` files with inspect_ai's naming scheme."""
    return sorted(
        path
        for path in log.rglob("*")
        if path.suffix == ".eval" or (path.suffix == ".json" and _STAMP.match(path.name))
    )


def scored_sample(sample: "EvalSample") -> ScoredSample:
    """Return the scores and rollouts of a log's sample."""
    labels: dict[str, LabelValue] = {}
    for scorer, score in (sample.scores or {}).items():
        labels |= flat_labels(scorer, score.value)
    name = f"sample {sample.id} epoch {sample.epoch}"
    ids = tuple(dict.fromkeys(rollout_id for one in references(sample) for rollout_id in one["rollout_ids"]))
    why, unscored = "its model calls name no rollout, and no rollout has their prompts", "it has no score"
    if sample.error is not None:
        unscored = f"it failed: {(sample.error.message.splitlines() or ['no reason given'])[0][:200]}"
        why = unscored
    if ids:
        return ScoredSample(name, labels, ids, unscored=unscored)
    calls = [event for event in sample.events if event.event == "model" and event.call is not None]
    hashes = tuple(canonical_hash(one.call.request["messages"]) for one in calls if "messages" in one.call.request)
    return ScoredSample(
        name, labels, (), hashes, answers=tuple(one.output.completion for one in calls), problem=why, unscored=unscored
    )


def references(sample: "EvalSample") -> Iterator[dict[str, Any]]:
    """Yield the references to rollouts in a sample's model calls, in order."""
    for event in sample.events:
        if event.event == "model":
            found = (event.output.metadata or {}).get(REFERENCE, {})
            if found.get("rollout_ids"):
                yield found
