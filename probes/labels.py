"""What a probe can be trained to read: a label's name turned into a target, one value per example.

Labels come from four places: columns of a table (CSV or parquet) that the caller gives; the built-in ones below, which need a
run's record; what the record has beside them, the fields of the problems and what scorers found; and the labels that were sent
with the capture and lie in the store's index. A field that is called as a built-in label is `field:NAME`.

A new built-in label is one line in `LABELS`.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Shaped

from probes.errors import ProbeDataError
from probes.kinds import TargetKind
from roentgen.contract import plain_labels
from roentgen.runs import Posed, RunConfig, Sample, same_question

_CALCULATION = re.compile(r"<<[^<>]*=\s*(-?[\d.,]+)>>")
_NUMBER = re.compile(r"-?[\d.,]*\d")


@dataclass(frozen=True)
class Example:
    """One sample: an attempt at a problem, whose activations are somewhere."""

    problem: str
    """The id of what it is an attempt at."""
    epoch: int
    """Which attempt."""
    rollout_id: str
    """Its activations."""
    n_prompt: int
    """Tokens of the prompt."""
    n_completion: int
    """Tokens generated."""
    truncated: bool
    """Whether it was cut."""
    question: str
    """The problem's text."""
    labels: dict[str, Any]
    """What was stored with the activations."""
    sample: Sample | None = None
    """The run's record of it, None if it comes from a session alone."""
    config: RunConfig | None = None
    """The run's configuration, likewise."""
    asked: str | None = None
    """The question without what surrounds it, where `question` is a whole prompt and the question is known; else None."""

    @property
    def recorded(self) -> dict[str, Any]:
        """What the record has of it that may be a label: its problem's fields, and what scorers found."""
        return {} if self.sample is None else {**plain_labels(self.sample.fields), **self.sample.values}

    @property
    def posed(self) -> Posed:
        """What it was asked, to be compared with what others were asked."""
        if self.sample is not None:
            return self.sample.posed
        template = self.labels.get("template")
        prompt = self.question if self.asked is None else None
        return Posed(self.problem, self.asked, None if template is None else str(template), prompt)

    @property
    def unread(self) -> bool:
        """Whether no answer was found in it; False where that is not known."""
        if self.sample is None or self.config is None:
            return "correct" in self.labels and self.labels.get("answer", "") is None
        return self.sample.answers.get(self.config.settings.get("extractor", ""), "") is None


@dataclass(frozen=True)
class Target:
    """What is to be read."""

    name: str
    """The label."""
    kind: TargetKind
    """True or False, a number, or one of several classes."""
    values: Shaped[np.ndarray, "samples"]
    """One per example: bool, float64, or the class's number, `[samples]`."""
    classes: tuple[str, ...] = ()
    """The classes' names, for a target of several."""

    @classmethod
    def of(cls, name: str, values: Sequence[Any]) -> "Target":
        """Tell from values what kind of target they are: booleans, numbers, or names.

        Two names (or the numbers 0 and 1) make a binary target whose True is the second in order.

        Raises:
            ProbeDataError: if some are numbers and others texts.
        """
        if all(isinstance(value, bool | np.bool_) for value in values):
            return cls(name, "binary", np.array(values, dtype=bool))
        numeric = [isinstance(value, int | float | bool | np.number | np.bool_) for value in values]
        if all(numeric):
            numbers = np.array(values, dtype=np.float64)
            if set(numbers.tolist()) <= {0.0, 1.0}:
                return cls(name, "binary", numbers == 1, ("0", "1"))
            return cls(name, "real", numbers)
        if any(numeric):
            number, text = values[numeric.index(True)], values[numeric.index(False)]
            raise ProbeDataError(
                f"label: {name!r} has numbers, such as {number!r}, and texts, such as {text!r}; a probe reads one or the other"
            )
        names, places = np.unique([str(value) for value in values], return_inverse=True)
        if len(names) <= 2:
            return cls(name, "binary", places == 1, tuple(names))
        return cls(name, "classes", places.astype(np.int64), tuple(names))


def _recorded(read: Callable[[Sample], Any]) -> Callable[[Sequence[Example]], list[Any]]:
    return lambda examples: [None if example.sample is None else read(example.sample) for example in examples]


def _configured(read: Callable[[dict[str, Any]], Any]) -> Callable[[Sequence[Example]], list[Any]]:
    return lambda examples: [None if example.config is None else read(example.config.hashed) for example in examples]


def difficulty(examples: Sequence[Example]) -> list[float | None]:
    """Return the share of attempts at each example's problem that are wrong, over its run's configuration."""
    problems = same_question([example.posed for example in examples])
    verdicts = defaultdict(list)
    for example, problem in zip(examples, problems, strict=True):
        if example.sample is not None:
            verdicts[example.sample.config_hash, problem].append(example.sample.correct)
    return [
        None if e.sample is None else 1 - float(np.mean(verdicts[e.sample.config_hash, problem]))
        for e, problem in zip(examples, problems, strict=True)
    ]


def number_of_steps(sample: Sample) -> float:
    """Count the lines of the gold solution, without the one that gives the answer (`#### 18`)."""
    lines = [line for line in sample.solution.splitlines() if line.strip()]
    return float(sum(not line.lstrip().startswith("####") for line in lines))


def compressed(value: str | float | None) -> float | None:
    """Return sign(v)·log10(1 + |v|): answers span many orders of magnitude, and a squared error would see the largest only."""
    if isinstance(value, str):
        found = _NUMBER.search(value)
        value = _as_float(found[0]) if found else None
    return None if value is None else float(np.sign(value) * np.log10(1 + abs(value)))


def step_value(number: int) -> Callable[[Sequence[Example]], list[float | None]]:
    """Return a label: what the gold solution's `number`-th calculation (from 1) gives, compressed; None where it has fewer."""

    def read(sample: Sample) -> float | None:
        found = _CALCULATION.findall(sample.solution)
        return compressed(found[number - 1]) if len(found) >= number else None

    return _recorded(read)


LABELS: dict[str, Callable[[Sequence[Example]], list[Any]]] = {
    "correct": _recorded(lambda sample: sample.correct),
    "truncated": lambda examples: [example.truncated for example in examples],
    "difficulty": difficulty,
    "steps": _recorded(number_of_steps),
    "tools": _configured(lambda hashed: bool(hashed.get("tools"))),
    "variant": _recorded(lambda sample: sample.variant),
    "response_length": lambda examples: [float(example.n_completion) for example in examples],
    "gold_value": _recorded(lambda sample: compressed(sample.gold)),
}
"""Built-in labels; each gives a value per example, None where it has none. Beside them, `step_value:k`."""


def read_label(name: str, examples: Sequence[Example], table: str | Path | None = None) -> list[Any]:
    """Return a label's value of each example, None where it has none.

    Args:
        name: a built-in label, a column of the table, or a label stored with the activations.
        examples: of what.
        table: a CSV or parquet file with a column `rollout_id`, or `problem_id` and perhaps `epoch`, and one per label.

    Raises:
        ProbeDataError: if there is no such label, or the table cannot be joined.
    """
    prefix, _, rest = name.partition(":")
    columns = _read_table(table) if table is not None else None
    if columns is not None and name in columns:
        return _from_table(columns, name, examples)
    recorded = sorted({label for example in examples for label in example.recorded})
    if name in LABELS:
        if name in recorded:
            raise ProbeDataError(
                f"label: {name!r} is built in, and a field of these problems too; for the field, ask for field:{name}"
            )
        return LABELS[name](examples)
    if prefix == "step_value" and rest.isdigit() and int(rest) > 0:
        return step_value(int(rest))(examples)
    if prefix == "field" and rest in recorded:
        return [example.recorded.get(rest) for example in examples]
    stored = sorted({label for example in examples for label in (*example.labels, *example.recorded)})
    if name in stored:
        return [example.recorded.get(name, example.labels.get(name)) for example in examples]
    given = sorted(set(columns.columns) - {"rollout_id", "problem_id", "epoch"}) if columns is not None else []
    raise ProbeDataError(
        f"label: {name!r} is not known; allowed are {', '.join([*LABELS, 'step_value:1', *given, *stored])}"
        + ("" if columns is not None else ", and any column of a table (--table)")
    )


def _read_table(path: str | Path) -> pd.DataFrame:
    path = Path(path)
    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        return pd.read_csv(path, dtype={"problem_id": str, "rollout_id": str})
    except (OSError, ValueError) as error:
        raise ProbeDataError(f"table: {path} cannot be read: {error}") from error


def _from_table(table: pd.DataFrame, name: str, examples: Sequence[Example]) -> list[Any]:
    if "rollout_id" in table:
        on = ["rollout_id"]
        keys: list[tuple[Any, ...]] = [(example.rollout_id,) for example in examples]
    elif "problem_id" in table and "epoch" in table:
        on, keys = ["problem_id", "epoch"], [(example.problem, example.epoch) for example in examples]
    elif "problem_id" in table:
        on, keys = ["problem_id"], [(example.problem,) for example in examples]
    else:
        raise ProbeDataError("table: it needs a column rollout_id, or problem_id (and perhaps epoch), to be joined on")
    if table.duplicated(on).any():
        raise ProbeDataError(f"table: several rows have the same {' and '.join(on)}")
    values = dict(zip(table[on].itertuples(index=False, name=None), table[name].tolist(), strict=True))
    return [None if pd.isna(value := values.get(key)) else value for key in keys]


def _as_float(text: str) -> float | None:
    try:
        return float(text.replace(",", "").rstrip("."))
    except ValueError:
        return None
