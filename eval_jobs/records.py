"""What one problem is, and how a record becomes one.

A record is a mapping with `question` and `answer`, whatever it comes from: a line, a row, a dictionary. The answer is a number,
a text, or a solution that ends with `#### <answer>` as GSM8K's do. Further fields are kept: prompts and scorers may use them,
and those that are plain values are labels of the stored rollout.
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
"""Labels that an evaluation or the server sets itself."""

CONSUMED = frozenset({"question", "answer", "solution", "problem_id", "template", "sample_id"})
"""Fields with a meaning of their own. What a sample is called is the evaluation's to say."""

_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")
_NO_FIELDS: dict[str, Any] = {}
"""What all problems without further fields have, of which there may be millions."""


class ProblemError(EvalError):
    """Problems cannot be loaded; the message names the source or the line."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem."""

    problem_id: str
    """Stable across runs, "gsm8k-test-0001"."""
    number: int
    """Its place in the source, from 1; it names the sample's files. 0 where it is not known."""
    question: str
    """As posed."""
    solution: str
    """The gold rationale, which may end with `#### <answer>`."""
    gold: str
    """The gold answer; of a number, without commas."""
    shots: tuple["Problem", ...] = ()
    """Solved problems to be shown before it."""
    template: str | None = None
    """What the question was made from, which other problems may share; None if it is like no other."""
    fields: Mapping[str, Any] = field(default_factory=lambda: _NO_FIELDS, hash=False)
    """What else its record has."""

    @property
    def labels(self) -> dict[str, LabelValue]:
        """Those of the further fields that can be labels: numbers, truth values and short texts."""
        return plain_labels(self.fields)


def is_number(gold: str) -> bool:
    """Whether a gold answer is a number."""
    return bool(_NUMBER.fullmatch(gold))


def gold_answer(solution: str) -> str | None:
    """Return what follows the last `####`, commas removed; None if that is not a number."""
    gold = gold_of(solution)
    return gold if "####" in solution and is_number(gold) else None


def gold_of(answer: str) -> str:
    """Return the gold answer of a solution: what follows the last `####`, or the whole text; of a number, without commas."""
    gold = answer.rpartition("####")[2].strip()
    plain = gold.replace(",", "")
    return plain if is_number(plain) else gold


def make_problem(record: Any, number: int, where: str, name: str) -> Problem:
    """Return the problem of a record.

    Args:
        record: with `question` and `answer`, and perhaps `problem_id`, `solution`, `template`; or a problem.
        number: its place in the source, from 1.
        where: what messages call it.
        name: what ids that are made up begin with. They have a hash of the question: an edited record is another problem.

    Raises:
        ProblemError: if it is no such record.
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
            f"{where}: a field {taken[0]!r} would hide a label that stored rollouts have; rename it (--columns)"
        )
    given_id = record.get("problem_id")
    problem_id = generated_id(name, number, question) if given_id is None else str(given_id)
    if not 1 <= len(problem_id) <= 200 or not is_text(problem_id):
        raise ProblemError(f"{where}: 'problem_id' must be a text of 1 to 200 characters, not {preview(problem_id)}")
    return Problem(problem_id, number, question, solution, gold, template=template, fields=further or _NO_FIELDS)


def generated_id(name: str, number: int, question: str) -> str:
    """Return the id of a problem that has none."""
    return f"{name}-{number:04d}-{hashlib.sha256(question.encode()).hexdigest()[:8]}"


def answer_of(gold: str, solution: str) -> dict[str, str]:
    """Return the fields of a record that give a gold answer and a solution."""
    return {"answer": solution} if gold_of(solution) == gold else {"answer": gold, "solution": solution}


def record_of(problem: Problem) -> dict[str, Any]:
    """Return the record that a problem is made from again, without an id that was made up."""
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
    """Return the gold answer, and the solution."""
    answer = _plain(record.get("answer"))
    if isinstance(answer, bool | int | float) and not (isinstance(answer, float) and not math.isfinite(answer)):
        # Without an exponent, which is no way to write an answer: 1e-05 would be read as a text.
        gold = f"{Decimal(str(answer)):f}" if isinstance(answer, float) else str(answer)
        written = f"#### {gold}"
    elif answer is None or isinstance(answer, str):
        written = _text(record, "answer", where)
        gold = gold_of(written)
    else:
        raise ProblemError(
            f"{where}: 'answer' must be a text, a number, true or false, not {preview(answer)}; what else a scorer needs goes "
            "into fields of other names"
        )
    if not gold:
        raise ProblemError(f"{where}: 'answer' has nothing behind '####'")
    return gold, written if record.get("solution") is None else _text(record, "solution", where)


def _value(name: Any, value: Any, where: str) -> Any:
    """Return a further field's value as JSON has it."""
    value = _plain(value)
    try:
        text = json.dumps([name, value], ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ProblemError(
            f"{where}: the field {name!r} cannot be kept: {preview(value)} is not JSON ({error}); choose fields with --fields"
        ) from error
    if not isinstance(name, str) or not is_text(text):
        raise ProblemError(f"{where}: the field {name!r} has half a surrogate pair, or a name that is no text")
    # As it is read again: a tuple is a list there, and a key a text.
    return json.loads(text)[1] if isinstance(value, list | tuple | dict) else value


def _plain(value: Any) -> Any:
    """Return a value of a table as Python has it: NumPy's scalars and arrays, decimals, and dates, which become texts. NaN and
    what else pandas has for nothing is None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, Decimal):
        value = int(value) if value.is_finite() and value == value.to_integral_value() else float(value)
    return None if isinstance(value, float) and math.isnan(value) else value
