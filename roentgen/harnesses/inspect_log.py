"""Reads inspect_ai's logs with inspect_ai: each sample's scores, and the rollouts that its model calls name.

The provider `roentgen/…` leaves a reference in every output's metadata. Calls of other providers are known by the conversation
that was sent, where that went to an address `/v1/r/RUN/-/1`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roentgen.contract import LabelValue, canonical_hash
from roentgen.harnesses.scored import LogError, Scored, flat_labels

if TYPE_CHECKING:
    from inspect_ai.log import EvalSample

REFERENCE = "roentgen"
"""Where in an output's metadata the reference is."""


def read_inspect(log: Path) -> Iterator[Scored]:
    """Yield a log's samples, one in memory at a time.

    Raises:
        LogError: if inspect_ai is not installed, or it cannot read the log.
    """
    try:
        from inspect_ai.log import read_eval_log_samples
    except ImportError as error:
        raise LogError(
            f"{log}: logs of inspect_ai need inspect_ai; pip install 'roentgen-activations[inspect]'"
        ) from error
    try:
        for sample in read_eval_log_samples(str(log), all_samples_required=False):
            yield scored_sample(sample)
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise LogError(f"{log} is no log that inspect_ai can read: {error}") from error


def scored_sample(sample: "EvalSample") -> Scored:
    """Return what a sample of a log says."""
    labels: dict[str, LabelValue] = {}
    for scorer, score in (sample.scores or {}).items():
        labels |= flat_labels(scorer, score.value)
    name = f"sample {sample.id} epoch {sample.epoch}"
    ids = tuple(dict.fromkeys(rollout_id for one in references(sample) for rollout_id in one["rollout_ids"]))
    why = "its model calls name no rollout, and none was made under their prompts"
    if sample.error is not None and not ids:
        why = f"it failed: {sample.error.message.splitlines()[0][:200] if sample.error.message else 'no reason given'}"
    if ids:
        return Scored(name, labels, ids)
    calls = [event for event in sample.events if event.event == "model" and event.call is not None]
    hashes = tuple(canonical_hash(one.call.request["messages"]) for one in calls if "messages" in one.call.request)
    return Scored(name, labels, (), hashes, answers=tuple(one.output.completion for one in calls), problem=why)


def references(sample: "EvalSample") -> Iterator[dict[str, Any]]:
    """Yield the references to rollouts that a sample's model calls left, in their order."""
    for event in sample.events:
        if event.event == "model":
            found = (event.output.metadata or {}).get(REFERENCE, {})
            if found.get("rollout_ids"):
                yield found
