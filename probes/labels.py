"""Labels: converts a label's name to a target, one value per example.

Labels come from four sources: columns of a table (CSV or parquet) that the caller provides; the built-in labels below,
which need a run's record; other data in the record, namely the problems' fields and the scorers' values; and the labels
stored in the store's index. A field with the name of a built-in label is `field:NAME`.

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
    """An example: one attempt at a problem with stored activations."""

    problem: str
    """The problem's id."""
    epoch: int
    """Number of the attempt."""
    rollout_id: str
    """Id of the rollout with its activations."""
    n_prompt: int
    """Tokens of the prompt."""
    n_completion: int
    """Tokens generated."""
    truncated: bool
    """True if it was truncated."""
    question: str
    """The problem's text."""
    labels: dict[str, Any]
    """Labels stored with the activations."""
    sample: Sample | None = None
    """Its sample in the run; None if the example comes from a session alone."""
    config: RunConfig | None = None
    """The run's configuration, likewise."""
    asked: str | None = None
    """The question alone, if `question` is a whole prompt and the question within it is known; otherwise None."""

    @property
    def recorded(self) -> dict[str, Any]:
        """Additional labels from the record: its problem's fields and the scorers' values."""
        return {} if self.sample is None else {**plain_labels(self.sample.fields), **self.sample.values}

    @property
    def posed(self) -> Posed:
        """The problem, for comparison with those of other examples."""
        if self.sample is not None:
            return self.sample.posed
        template = self.labels.get("template")
        prompt = self.question if self.asked is None else None
        return Posed(self.problem, self.asked, None if template is None else str(template), prompt)

    @property
    def unread(self) -> bool:
        """True if no answer was extracted; False if that is unknown."""
        if self.sample is None or self.config is None:
            return "correct" in self.labels and self.labels.get("answer", "") is None
        return self.sample.answers.get(self.config.settings.get("extractor", ""), "") is None


@dataclass(frozen=True)
class Target:
    """A target: what a probe predicts."""

    name: str
    """The label."""
    kind: TargetKind
    """Whether it is True or False, a number, or one of several classes."""
    values: Shaped[np.ndarray, "samples"]
    """Values per example: bool, float64, or the class number, `[samples]`."""
    classes: tuple[str, ...] = ()
    """Names of the classes of a target with several."""

    @classmethod
    def of(cls, name: str, values: Sequence[Any]) -> "Target":
        """Create a target whose kind is inferred from the values: booleans, numbers, or names.

        Two names (or the numbers 0 and 1) make a binary target in which True is the second in order.

        Raises:
            ProbeDataError: if the values mix numbers and texts.
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
                f"label: {name!r} mixes numbers, such as {number!r}, and texts, such as {text!r}; use one or the other"
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
    """Return the share of incorrect attempts at each example's problem, under its run's configuration."""
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
    """Count the lines of the gold solution, excluding the answer line (`#### 18`)."""
    lines = [line for line in sample.solution.splitlines() if line.strip()]
    return float(sum(not line.lstrip().startswith("####") for line in lines))


def compressed(value: str | float | None) -> float | None:
    """Return sign(v)·log10(1 + |v|): answers span many orders of magnitude, and the largest would dominate a squared error."""
    if isinstance(value, str):
        found = _NUMBER.search(value)
        value = _as_float(found[0]) if found else None
    return None if value is None else float(np.sign(value) * np.log10(1 + abs(value)))


def step_value(number: int) -> Callable[[Sequence[Example]], list[float | None]]:
    """Return a label: the compressed result of the gold solution's `number`-th calculation (from 1); None if it has fewer."""

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
"""Built-in labels; each returns a value per example, or None. In addition there is `step_value:k`."""


def read_label(name: str, examples: Sequence[Example], table: str | Path | None = None) -> list[Any]:
    """Return a label's value per example; None where an example has none.

    Args:
        name: a built-in label, a column of the table, or a label stored with the activations.
        examples: the examples.
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
                f"label: {name!r} is both a built-in label and a field of these problems; use field:{name} for the field"
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
        f"label: {name!r} is unknown; allowed are {', '.join([*LABELS, 'step_value:1', *given, *stored])}"
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
        raise ProbeDataError("table: a column rollout_id, or problem_id (and optionally epoch), is required to join it")
    if table.duplicated(on).any():
        raise ProbeDataError(f"table: several rows have the same {' and '.join(on)}")
    values = dict(zip(table[on].itertuples(index=False, name=None), table[name].tolist(), strict=True))
    return [None if pd.isna(value := values.get(key)) else value for key in keys]


def _as_float(text: str) -> float | None:
    try:
        return float(text.replace(",", "").rstrip("."))
    except ValueError:
        return None
