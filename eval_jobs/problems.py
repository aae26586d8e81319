"""Where problems come from.

A source is a function that yields `Problem`s in a fixed order; `load_problems` takes the first N. Problem i of a source is
the same problem for every N and on every machine, because its id is what joins samples, activations and labels. A new
source is one function and one line in `SOURCES`; whatever is not named there is read as a file in GSM8K's own format,
a JSON object per line with `question` and `answer`, the answer ending with `#### <number>`.

Everything is read and checked before anything runs: a broken line found after an hour of GPU time helps nobody.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from eval_jobs import EvalError

GSM8K_FOLDER_VARIABLE = "ROENTGEN_GSM8K_DIR"
ARITHMETIC_SEED = 0
ARITHMETIC_SIZE = 1_000_000

_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")


class ProblemError(EvalError):
    """Problems cannot be loaded; the message names the source or the line."""


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        problem_id: stable across runs, "gsm8k-test-0001".
        number: its place in the source, from 1; it names the sample's files.
        question: as posed.
        solution: the gold rationale, ending with `#### <number>`.
        gold: the gold answer: what follows `####`, commas removed.
    """

    problem_id: str
    number: int
    question: str
    solution: str
    gold: str


def load_problems(source: str, samples: int) -> list[Problem]:
    """Return the first `samples` problems of a source, or all of them if it has fewer.

    Args:
        source: a name in `SOURCES`, or the path of a file in GSM8K's format.
        samples: how many.

    Raises:
        ProblemError: if the source is unknown, cannot be read, is empty or has a malformed line.
    """
    if source in SOURCES:
        found = SOURCES[source]()
    elif source.endswith(".jsonl") or Path(source).exists():
        found = _file(Path(source).expanduser())
    else:
        raise ProblemError(
            f"--problems: {source!r} is unknown; allowed are {', '.join(SOURCES)}, or a .jsonl file's path"
        )
    problems = list(islice(found, samples))
    if not problems:
        raise ProblemError(f"--problems: {source} has no problems")
    return problems


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
    try:
        import reasoning_gym
    except ImportError:
        raise ProblemError("--problems arithmetic needs reasoning-gym: pip install 'roentgen[local]'") from None
    sums = reasoning_gym.create_dataset(
        "chain_sum",
        min_terms=2,
        max_terms=3,
        min_digits=1,
        max_digits=2,
        seed=ARITHMETIC_SEED,
        size=ARITHMETIC_SIZE,  # items are made one by one, each from (seed, index)
    )
    seen: set[str] = set()
    for item in sums:
        expression, gold = item["metadata"]["expression"], item["answer"]
        if expression in seen:  # the same sum twice would put one question on both sides of a split by problem
            continue
        seen.add(expression)
        number, solution = len(seen), f"{expression} = {gold}\n#### {gold}"
        yield Problem(f"arithmetic-{number:04d}", number, f"What is {expression}?", solution, gold)


def gsm8k() -> Iterator[Problem]:
    """Yield GSM8K's test set, from a local folder if `$ROENTGEN_GSM8K_DIR` names one, otherwise from the hub.

    Raises:
        ProblemError: if neither can be read, or a line is malformed.
    """
    folder = os.environ.get(GSM8K_FOLDER_VARIABLE)
    lines = _read_jsonl(Path(folder).expanduser() / "test.jsonl") if folder else _gsm8k_from_hub()
    for number, question, solution, gold in lines:
        yield Problem(f"gsm8k-test-{number:04d}", number, question, solution, gold)


SOURCES: dict[str, Callable[[], Iterator[Problem]]] = {
    "arithmetic": arithmetic,
    "gsm8k": gsm8k,
}

_Line = tuple[int, str, str, str]
"""Line number, question, solution, gold."""


def _file(path: Path) -> Iterator[Problem]:
    """Yield a file's problems. The id carries a hash of the question, so that an edited line is another problem."""
    for number, question, solution, gold in _read_jsonl(path):
        digest = hashlib.sha256(question.encode()).hexdigest()[:8]
        yield Problem(f"{path.stem[:100]}-{number:04d}-{digest}", number, question, solution, gold)


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
    return number, fields["question"], fields["answer"], gold


def _gsm8k_from_hub() -> Iterator[_Line]:
    import datasets

    try:
        rows = datasets.load_dataset("openai/gsm8k", "main", split="test")
    except (OSError, ValueError) as error:  # no route, no such data set, or offline without a cached copy
        raise ProblemError(
            f"GSM8K cannot be had: the hub does not answer and ${GSM8K_FOLDER_VARIABLE} is not set. Either connect to "
            f"the hub, or set {GSM8K_FOLDER_VARIABLE} to a folder with GSM8K's train.jsonl and test.jsonl. ({error})"
        ) from error
    for number, row in enumerate(rows, start=1):
        gold = gold_answer(row["answer"])
        if gold is None:
            raise ProblemError(f"openai/gsm8k, row {number}: 'answer' has no '#### <number>' line")
        yield number, row["question"], row["answer"], gold
