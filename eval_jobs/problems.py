"""Where problems come from.

A source is a function that yields `Problem`s in a fixed order. Problem i of a source is the same problem however many are taken
and on every machine, because its id is what joins samples, activations and labels. A new source is one function and one line
in `SOURCES`; whatever is not named there is read as a file in GSM8K's own format, a JSON object per line with `question`
and `answer`, the answer ending with `#### <number>`.

Questions that were made from one template say so, because they are hardly more independent than attempts at one question.

Everything is read and checked before anything runs: a broken line found after an hour of GPU time helps nobody.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

from eval_jobs import EvalError

GSM8K_FOLDER_VARIABLE = "ROENTGEN_GSM8K_DIR"
GENERATED_SEED = 0
GENERATED_SIZE = 1_000_000

_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")


class ProblemError(EvalError):
    """Problems cannot be loaded; the message names the source or the line."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem."""

    problem_id: str
    """Stable across runs, "gsm8k-test-0001"."""
    number: int
    """Its place in the source, from 1; it names the sample's files."""
    question: str
    """As posed."""
    solution: str
    """The gold rationale, ending with `#### <number>`."""
    gold: str
    """The gold answer: what follows `####`, commas removed."""
    shots: tuple["Problem", ...] = ()
    """Solved problems to be shown before it."""
    template: str | None = None
    """What the question was made from, which other problems may share; None if it is like no other."""


def read_source(source: str) -> Iterator[Problem]:
    """Yield the problems of a source, in its order.

    Args:
        source: a name in `SOURCES`, or the path of a file in GSM8K's format.

    Raises:
        ProblemError: if the source is unknown, cannot be read or has a malformed line.
    """
    if source in SOURCES:
        return SOURCES[source]()
    if source.endswith(".jsonl") or Path(source).exists():
        return _file(Path(source).expanduser())
    raise ProblemError(f"--problems: {source!r} is unknown; allowed are {', '.join(SOURCES)}, or a .jsonl file's path")


def gold_answer(solution: str) -> str | None:
    """Return what follows the last `####`, commas removed; None if that is not a number."""
    _, mark, answer = solution.rpartition("####")
    gold = answer.strip().replace(",", "")
    return gold if mark and _NUMBER.fullmatch(gold) else None


def arithmetic() -> Iterator[Problem]:
    """Yield generated sums of 2 or 3 terms of 1 or 2 digits: what a very small model sometimes gets right.

    Raises:
        ProblemError: if reasoning-gym is not installed.
    """
    for number, item, _ in _generated("arithmetic", "chain_sum", min_terms=2, max_terms=3, min_digits=1, max_digits=2):
        expression, gold = item["metadata"]["expression"], item["answer"]
        solution = f"{expression} = {gold}\n#### {gold}"
        yield Problem(f"arithmetic-{number:04d}", number, f"What is {expression}?", solution, gold)


def gsm_symbolic() -> Iterator[Problem]:
    """Yield problems made from the 100 templates of GSM-Symbolic (Mirzadeh et al. 2024, arXiv 2410.05229): GSM8K's own
    stories with other names and numbers, by reasoning-gym's generator.

    Raises:
        ProblemError: if reasoning-gym is not installed.
    """
    for number, item, template in _generated("gsm-symbolic", "gsm_symbolic"):
        solution, problem_id = item["metadata"]["answer_cot"], f"gsm-symbolic-{number:04d}"
        made_from = None if template is None else f"gsm-symbolic/{template}"
        yield Problem(problem_id, number, item["question"], solution, item["answer"], template=made_from)


def gsm8k() -> Iterator[Problem]:
    """Yield GSM8K's test set, from a local folder if `$ROENTGEN_GSM8K_DIR` names one, otherwise from the hub.

    Raises:
        ProblemError: if neither can be read, or a line is malformed.
    """
    return _gsm8k("test")


def gsm8k_train() -> Iterator[Problem]:
    """Yield GSM8K's training set, found as the test set is.

    Raises:
        ProblemError: as for the test set.
    """
    return _gsm8k("train")


SOURCES: dict[str, Callable[[], Iterator[Problem]]] = {
    "arithmetic": arithmetic,
    "gsm8k": gsm8k,
    "gsm8k-train": gsm8k_train,
    "gsm-symbolic": gsm_symbolic,
}

_Line = tuple[int, str, str, str, str | None]
"""Line number, question, solution, gold, template."""


def _generated(source: str, dataset: str, **settings: int) -> Iterator[tuple[int, dict[str, Any], int | None]]:
    """Yield reasoning-gym's items, numbered, with the template of each where there are templates; each is made when it is
    asked for, from its number."""
    try:
        import reasoning_gym
    except ImportError:
        raise ProblemError(f"--problems {source} needs reasoning-gym: pip install reasoning-gym") from None
    items = reasoning_gym.create_dataset(dataset, seed=GENERATED_SEED, size=GENERATED_SIZE, **settings)
    seen: set[str] = set()
    numbers = count(1)
    templates: list[int] | None = getattr(items, "task_indices", None)
    for place, item in enumerate(items):
        if item["question"] in seen:  # the same question twice would put one on both sides of a split by problem
            continue
        seen.add(item["question"])
        yield next(numbers), item, None if templates is None else templates[place]


def _gsm8k(split: Literal["train", "test"]) -> Iterator[Problem]:
    folder = os.environ.get(GSM8K_FOLDER_VARIABLE)
    lines = _read_jsonl(Path(folder).expanduser() / f"{split}.jsonl") if folder else _gsm8k_from_hub(split)
    for number, question, solution, gold, _ in lines:
        yield Problem(f"gsm8k-{split}-{number:04d}", number, question, solution, gold)


def _file(path: Path) -> Iterator[Problem]:
    """Yield a file's problems. The id carries a hash of the question, so that an edited line is another problem."""
    for number, question, solution, gold, template in _read_jsonl(path):
        digest = hashlib.sha256(question.encode()).hexdigest()[:8]
        problem_id = f"{path.stem[:100]}-{number:04d}-{digest}"
        yield Problem(problem_id, number, question, solution, gold, template=template)


def _read_jsonl(path: Path) -> list[_Line]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ProblemError(f"problems cannot be read: {path}: {error.strerror}") from error
    return [_parse(line, path, number) for number, line in enumerate(lines, start=1) if line.strip()]


def _parse(line: bytes, path: Path, number: int) -> _Line:
    where = f"{path.name}, line {number}"
    try:
        fields = json.loads(line)
        json.dumps(fields, ensure_ascii=False).encode()  # half an escaped character pair could not be sent
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON or bad Unicode
        raise ProblemError(f"{where}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ProblemError(f"{where}: not a JSON object with 'question' and 'answer'")
    for name in ("question", "answer"):
        if not isinstance(fields.get(name), str) or not fields[name].strip():
            raise ProblemError(f"{where}: {name!r} must be a text that is not empty")
    gold = gold_answer(fields["answer"])
    if gold is None:
        raise ProblemError(f"{where}: 'answer' has no '#### <number>' line")
    return number, fields["question"], fields["answer"], gold, _template(fields)


def _template(fields: dict[str, Any]) -> str | None:
    """Return what a line says its question was made from: `template`, or `original_id` as GSM-Symbolic's files have it."""
    if fields.get("template") is not None:
        template = fields["template"]
        return template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    original = fields.get("original_id")
    return None if original is None else f"gsm8k/{original}"


def _gsm8k_from_hub(split: str) -> Iterator[_Line]:
    import datasets

    try:
        rows = datasets.load_dataset("openai/gsm8k", "main", split=split)
    except (OSError, ValueError) as error:  # no route, no such data set, or offline without a cached copy
        raise ProblemError(
            f"GSM8K cannot be had: the hub does not answer and ${GSM8K_FOLDER_VARIABLE} is not set. Either connect to "
            f"the hub, or set {GSM8K_FOLDER_VARIABLE} to a folder with GSM8K's train.jsonl and test.jsonl. ({error})"
        ) from error
    for number, row in enumerate(rows, start=1):
        gold = gold_answer(row["answer"])
        if gold is None:
            raise ProblemError(f"openai/gsm8k, row {number}: 'answer' has no '#### <number>' line")
        yield number, row["question"], row["answer"], gold, None
