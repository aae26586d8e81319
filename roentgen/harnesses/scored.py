"""`ScoredSample`: a sample of a harness's log, with its scores as labels, and the data that identifies its rollouts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from roentgen.contract import LabelValue
from roentgen.errors import RoentgenError

GRADES = {"C": 1.0, "I": 0.0, "P": 0.5, "N": 0.0}
"""inspect_ai's grades (correct, incorrect, partially correct, no answer) and its numbers for them."""


class LogError(RoentgenError):
    """A log cannot be read; the message names it and says what to do."""


@dataclass(frozen=True)
class ScoredSample:
    """A sample of a log."""

    name: str
    """The sample's name in reports."""
    labels: dict[str, LabelValue]
    """The scores."""
    rollout_ids: tuple[str, ...] = ()
    """Rollouts that the log names."""
    prompt_hashes: tuple[str, ...] = ()
    """Hashes of the conversations that were sent; a run's address with problem `-` uses them as problem ids."""
    texts: tuple[str, ...] = ()
    """Raw texts that were sent."""
    answers: tuple[str, ...] = ()
    """The answers, which distinguish rollouts of one prompt."""
    problem: str = "no rollout has its prompts"
    """The reason to report if no rollout is found."""
    unscored: str = "it has no score"
    """The reason to report if it has no labels."""


def flat_labels(name: str, value: Any) -> dict[str, LabelValue]:
    """Convert a score to labels: one for a plain value, or one per part (`name.part`) of a list or an object.

    Args:
        name: name of the score.
        value: a number, a text, a list, an object, or another value, which is converted to text. NaN, which harnesses use for
            missing scores, becomes None.
    """
    if isinstance(value, Mapping):
        return {key: one for part, inner in value.items() for key, one in flat_labels(f"{name}.{part}", inner).items()}
    if isinstance(value, list | tuple):
        return {
            key: one for part, inner in enumerate(value) for key, one in flat_labels(f"{name}.{part}", inner).items()
        }
    if isinstance(value, float) and not math.isfinite(value):
        return {name: None if math.isnan(value) else str(value)}  # labels are JSON, which allows only finite numbers
    if value is None or isinstance(value, str | bool | int | float):
        return {name: value}
    return {name: str(value)}


def with_grades(samples: Sequence[ScoredSample]) -> list[ScoredSample]:
    """Return samples with grades as numbers, for scores whose texts are all grades; choices such as A, B, C, D are not."""
    texts = [(name, value) for sample in samples for name, value in sample.labels.items() if isinstance(value, str)]
    named = {name for name, _ in texts} - {name for name, value in texts if value not in GRADES}
    return [
        replace(
            sample,
            labels={name: GRADES.get(str(v), v) if name in named else v for name, v in sample.labels.items()},
        )
        for sample in samples
    ]
