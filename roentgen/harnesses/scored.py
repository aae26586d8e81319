"""What a harness' log says of a sample: its scores, as labels, and what tells which rollouts are its."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from roentgen.contract import LabelValue
from roentgen.errors import RoentgenError

GRADES = {"C": 1.0, "I": 0.0, "P": 0.5, "N": 0.0}
"""inspect_ai's grades: correct, incorrect, partly correct, no answer; its own numbers for them."""


class LogError(RoentgenError):
    """A log cannot be read; the message names it and says what can be done."""


@dataclass(frozen=True)
class ScoredSample:
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
    problem: str = "no rollout was made under its prompts"
    """Why it has no rollouts, if none is found."""
    unscored: str = "it has no score"
    """Why it has no labels, if it has none."""


def flat_labels(name: str, value: Any) -> dict[str, LabelValue]:
    """Write a score as labels: one for a plain value, one per part (`name.part`) of a list or an object.

    Args:
        name: the score's.
        value: a number, a text, a list, an object, or something else, which is written as text. NaN, which harnesses write
            where nothing was scored, is None.
    """
    if isinstance(value, Mapping):
        return {key: one for part, inner in value.items() for key, one in flat_labels(f"{name}.{part}", inner).items()}
    if isinstance(value, list | tuple):
        return {
            key: one for part, inner in enumerate(value) for key, one in flat_labels(f"{name}.{part}", inner).items()
        }
    if isinstance(value, float) and not math.isfinite(value):
        return {name: None if math.isnan(value) else str(value)}  # labels are JSON, which has only finite numbers
    if value is None or isinstance(value, str | bool | int | float):
        return {name: value}
    return {name: str(value)}


def with_grades(samples: Sequence[ScoredSample]) -> list[ScoredSample]:
    """Return samples with grades as numbers: the texts of a score of which all are grades. A, B, C and D are none."""
    texts = [(name, value) for sample in samples for name, value in sample.labels.items() if isinstance(value, str)]
    named = {name for name, _ in texts} - {name for name, value in texts if value not in GRADES}
    return [
        replace(
            sample,
            labels={name: GRADES.get(str(v), v) if name in named else v for name, v in sample.labels.items()},
        )
        for sample in samples
    ]
