"""What a harness' log says of a sample: its scores, as labels, and what tells which rollouts are its."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from roentgen.contract import LabelValue

GRADES = {"C": 1.0, "I": 0.0, "P": 0.5, "N": 0.0}
"""inspect_ai's grades: correct, incorrect, partly correct, no answer; its own numbers for them."""


class LogError(Exception):
    """A log cannot be read; the message names it and says what can be done."""


@dataclass(frozen=True)
class Scored:
    """A sample of a log."""

    name: str
    """How a report calls it."""
    labels: dict[str, LabelValue]
    """Its scores."""
    rollout_ids: tuple[str, ...] = ()
    """Rollouts that the log names."""
    prompt_hashes: tuple[str, ...] = ()
    """Hashes of the conversations that were sent, by which a run's address `-` names them."""
    texts: tuple[str, ...] = ()
    """Raw texts that were sent."""
    answers: tuple[str, ...] = ()
    """What came back: tells apart rollouts of one prompt."""
    problem: str = field(default="no rollout was made under its prompts")
    """Why it has no rollouts, if none is found."""


def flat_labels(name: str, value: Any) -> dict[str, LabelValue]:
    """Write a score as labels: one for a plain value, one per part (`name.part`) of a list or an object.

    Args:
        name: the score's.
        value: a number, a text, a grade, a list, an object, or something else, which is written as text.
    """
    if isinstance(value, Mapping):
        return {key: one for part, inner in value.items() for key, one in flat_labels(f"{name}.{part}", inner).items()}
    if isinstance(value, list | tuple):
        return {
            key: one for part, inner in enumerate(value) for key, one in flat_labels(f"{name}.{part}", inner).items()
        }
    if isinstance(value, str):
        return {name: GRADES.get(value, value)}
    if isinstance(value, float) and not math.isfinite(value):
        return {name: str(value)}  # JSON, which labels are stored as, has only finite numbers
    if value is None or isinstance(value, bool | int | float):
        return {name: value}
    return {name: str(value)}
