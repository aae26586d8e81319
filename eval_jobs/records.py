"""A problem, and its construction from a record.

A record is a mapping with `question` and `answer`: a line, a row, or a dictionary. The answer is a number, a text, or a
solution that ends with `#### <answer>`, as GSM8K's do. Additional fields are kept: prompts and scorers may use them, and
those with plain values become labels of the stored rollout.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from typing import Any

from eval_jobs import EvalError
from roentgen.contract import SERVER_LABELS, LabelValue, is_text, plain_labels
from roentgen.extensions import preview

RESERVED = frozenset({"gold", "variant", *SERVER_LABELS})
"""Labels that the evaluation or the server sets."""

CONSUMED = frozenset({"question", "answer", "solution", "problem_id", "template", "sample_id"})
"""Fields with a predefined meaning. `sample_id` is set by the evaluation."""

_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")
_NO_FIELDS: dict[str, Any] = {}
"""Shared by all problems without additional fields, of which there may be millions."""


class ProblemError(EvalError):
    """Problems cannot be loaded; the message names the source or the line."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem."""

    problem_id: str
    """Identifier, stable across runs: "gsm8k-test-0001"."""
    number: int
    """Position in the source, from 1; it names the sample's files. 0 if unknown."""
    question: str
    """As posed."""
    solution: str
    """The reference solution, which may end with `#### <answer>`."""
    gold: str
    """The gold answer; numbers have no thousands separators."""
    shots: tuple["Problem", ...] = ()
    """Solved problems shown before it."""
    template: str | None = None
    """Template of the question, which other problems may share; None if it has none."""
    fields: Mapping[str, Any] = field(default_factory=lambda: _NO_FIELDS, hash=False)
    """Additional fields of its record."""

    @property
    def labels(self) -> dict[str, LabelValue]:
        """The additional fields that can be labels: numbers, booleans and short texts."""
        return plain_labels(self.fields)


def is_number(gold: str) -> bool:
    """Whether a gold answer is a number."""
    return bool(_NUMBER.fullmatch(gold))


def gold_answer(solution: str) -> str | None:
    """Return what follows the last `####`, without commas; None if that is not a number."""
    gold = gold_of(solution)
    return gold if "####" in solution and is_number(gold) else None


def gold_of(answer: str) -> str:
    """Return the gold answer of a solution: what follows the last `####`, or the whole text; numbers lose their commas."""
    gold = answer.rpartition("####")[2].strip()
    plain = gold.replace(",", "")
    return plain if is_number(plain) else gold


def make_problem(record: Any, number: int, where: str, name: str) -> Problem:
    """Create a problem from a record.

    Args:
        record: a mapping with `question` and `answer`, optionally `problem_id`, `solution` and `template`; or a problem.
        number: its position in the source, from 1.
        where: its name in error messages.
        name: prefix of generated ids. They include a hash of the question, so an edited record is a different problem.

    Raises:
        ProblemError: if the record is invalid.
    """
    if isinstance(record, Problem):
        return record
    if not isinstance(record, Mapping):
        raise ProblemError(f"{where}: not a record with 'question' and 'answer', but {preview(record)}")
    question = _text(record, "question", where)
    gold, solution = _answer(record, where)
    template = record.get("template")
    if template is None and record.get("original_id") is not None:  # as GSM-Symbolic's files have it
        template = f"gsm8k/{record['original_id']}"
    elif template is not None and not isinstance(template, str):
        template = json.dumps(template, sort_keys=True)
    further = {key: _value(key, value, where) for key, value in record.items() if key not in CONSUMED}
    if further.get("gold") == gold:  # as a run's own dataset.jsonl has it
        del further["gold"]
    if taken := sorted(further.keys() & RESERVED):
        raise ProblemError(
            f"{where}: the field name {taken[0]!r} is reserved for a label of stored rollouts; rename it (--columns)"
        )
    given_id = record.get("problem_id")
    problem_id = generated_id(name, number, question) if given_id is None else str(given_id)
    if not 1 <= len(problem_id) <= 200 or not is_text(problem_id):
        raise ProblemError(f"{where}: 'problem_id' must be a text of 1 to 200 characters, not {preview(problem_id)}")
    return Problem(problem_id, number, question, solution, gold, template=template, fields=further or _NO_FIELDS)


def generated_id(name: str, number: int, question: str) -> str:
    """Generate the id of a problem that has none."""
    return f"{name}-{number:04d}-{hashlib.sha256(question.encode()).hexdigest()[:8]}"


def answer_of(gold: str, solution: str) -> dict[str, str]:
    """Return the record fields for a gold answer and a solution."""
    return {"answer": solution} if gold_of(solution) == gold else {"answer": gold, "solution": solution}


def record_of(problem: Problem) -> dict[str, Any]:
    """Return the record of a problem, without a generated id."""
    record = {"question": problem.question, **answer_of(problem.gold, problem.solution), **problem.fields}
    if problem.template is not None:
        record["template"] = problem.template
    return (
        record
        if problem.problem_id == generated_id("problems", problem.number, problem.question)
        else {"problem_id": problem.problem_id, **record}
    )


def _text(record: Mapping[str, Any], name: str, where: str) -> str:
    value = record.get(name)
    allowed = "a text or a number" if name == "answer" else "a text"
    if name not in record:
        there = ", ".join(map(str, record)) or "no field"
        raise ProblemError(f"{where}: {name!r} is missing; the record has {there} (--columns renames)")
    if _plain(value) is None:
        raise ProblemError(f"{where}: {name!r} is null; it must be {allowed}, not empty")
    if not isinstance(value, str) or not value.strip() or not is_text(value):
        raise ProblemError(f"{where}: {name!r} must be {allowed}, not empty; it is {preview(value)}")
    return value


def _answer(record: Mapping[str, Any], where: str) -> tuple[str, str]:
    """Return the gold answer and the solution."""
    answer = _plain(record.get("answer"))
    if isinstance(answer, bool | int | float) and not (isinstance(answer, float) and not math.isfinite(answer)):
        # Without an exponent, which answers do not have: 1e-05 would be read as a text.
        gold = f"{Decimal(str(answer)):f}" if isinstance(answer, float) else str(answer)
        written = f"#### {gold}"
    elif answer is None or isinstance(answer, str):
        written = _text(record, "answer", where)
        gold = gold_of(written)
    else:
        raise ProblemError(
            f"{where}: 'answer' must be a text, a number, true or false, not {preview(answer)}; put other data into "
            "additional fields"
        )
    if not gold:
        raise ProblemError(f"{where}: 'answer' has nothing after '####'")
    return gold, written if record.get("solution") is None else _text(record, "solution", where)


def _value(name: Any, value: Any, where: str) -> Any:
    """Return an additional field's value in JSON types."""
    value = _plain(value)
    try:
        text = json.dumps([name, value], ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ProblemError(
            f"{where}: the field {name!r} cannot be kept: {preview(value)} is not JSON ({error}); choose fields with --fields"
        ) from error
    if not isinstance(name, str) or not is_text(text):
        raise ProblemError(f"{where}: the field {name!r} contains an unpaired surrogate, or its name is not a text")
    # As it will be read back: a tuple becomes a list, and a key a text.
    return json.loads(text)[1] if isinstance(value, list | tuple | dict) else value


def _plain(value: Any) -> Any:
    """Convert a table's value to a Python one: NumPy scalars and arrays, decimals, and dates (to texts). NaN and other
    missing values of pandas become None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, Decimal):
        value = int(value) if value.is_finite() and value == value.to_integral_value() else float(value)
    return None if isinstance(value, float) and math.isnan(value) else value
