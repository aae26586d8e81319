"""Sources of problems.

A source yields records in a fixed order, and each record becomes a `Problem` (`records`). Problem i of a source is the same
problem on every machine and for any number of problems taken, because its id joins samples, activations and labels. A
source is one of:

- a name in `SOURCES`: a function of this module, or of a package that declares one as an entry point of
  "roentgen.problems". A new one is one function and one line.
- a reference, `module:name` or `path/to/file.py:name`, to a function that returns records, or to the records themselves.
- `hf:OWNER/NAME`, a Hugging Face dataset, or a .csv, .parquet or .jsonl file (`tables`).
- in Python, such a function itself.

Questions made from a template record it, because they are hardly more independent than repeated attempts at one question.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal

from eval_jobs.records import Problem, ProblemError, gold_answer, is_number, make_problem
from eval_jobs.tables import HUB, Numbered, hub_name, load_rows, read_file, read_hub, read_jsonl, typed
from roentgen.extensions import Extension, ExtensionError, Registry, format_error, given, is_reference, preview

__all__ = ["GSM8K_FOLDER_VARIABLE", "SOURCES", "Problem", "ProblemError", "gold_answer", "is_number", "read_source"]

GSM8K_FOLDER_VARIABLE = "ROENTGEN_GSM8K_DIR"
GENERATED_SEED = 0
GENERATED_SIZE = 1_000_000
SET_NAME = 40
"""Maximum characters of a source's name in sample ids."""

Record = Mapping[str, Any] | Problem
ProblemSource = Callable[[], Iterable[Record]]
"""Returns records with `question` and `answer`, always in the same order."""


def read_source(
    source: str | ProblemSource, columns: Mapping[str, str] | None = None, fields: Sequence[str] | None = None
) -> Iterator[Problem]:
    """Yield the problems of a source in order.

    Args:
        source: a name in `SOURCES`, a reference, `hf:OWNER/NAME`, a file's path, or a function.
        columns: maps a problem's field to the column that holds it; other columns keep their names.
        fields: additional fields to keep; all if None.

    Raises:
        ProblemError: if the source is unknown or cannot be read, or a record is invalid.
    """
    name = set_name(source)
    records, stem = _records(source)
    if columns or fields is not None:
        records = _mapped(records, columns or {}, fields)
    if isinstance(source, str) and source.lower().endswith(".csv"):
        records = typed(records)
    problems = (make_problem(record, number, where, stem or name) for number, where, record in records)
    return problems if stem is None else iter(list(problems))  # a file is checked whole


def read_records(
    records: Iterable[Record], columns: Mapping[str, str] | None = None, fields: Sequence[str] | None = None
) -> Iterator[Problem]:
    """Yield the problems of given records.

    Args:
        records: mappings with `question` and `answer`, or problems.
        columns: as for a source.
        fields: likewise.

    Raises:
        ProblemError: if a record is invalid; the message names it.
    """
    numbered: Numbered = ((number, f"problems[{number - 1}]", record) for number, record in enumerate(records, start=1))
    for number, where, record in _mapped(numbered, columns or {}, fields):
        yield make_problem(record, number, where, "problems")


def find_source(source: str | ProblemSource) -> Extension[Any] | None:
    """Resolve a name, a reference or a function; None for a dataset or a file.

    Raises:
        ProblemError: if a reference cannot be resolved.
    """
    if not isinstance(source, str):
        return given(source)
    if source.startswith(HUB) or (
        source not in SOURCES and (Path(source).expanduser().exists() or not is_reference(source))
    ):
        return None
    try:
        return SOURCES.find(source)
    except ExtensionError as error:
        raise ProblemError(f"--problems: {error}") from error


def describe_source(source: str | ProblemSource) -> str:
    """Return the source as recorded in a run: resolvable from any folder, or a function's name."""
    if not isinstance(source, str):
        return f"{getattr(source, '__module__', 'given')}.{given(source).name}"
    if source in SOURCES or source.startswith(HUB):
        return source
    found = find_source(source)
    return str(Path(source).absolute()) if found is None else str(found.reference)


def set_name(source: str | ProblemSource) -> str:
    """Return the name of a source in run folders and sample ids: its own, a dataset's, a function's or a file's."""
    if not isinstance(source, str):
        stem = given(source).name
    elif source in SOURCES:
        stem = source
    elif source.startswith(HUB):
        stem = hub_name(source).rstrip("/").rpartition("/")[2]
    elif is_reference(source) and not Path(source).exists():
        stem = source.rpartition(":")[2]
    else:
        stem = Path(source).stem
    return re.sub(r"[^A-Za-z0-9.-]+", "-", stem[:SET_NAME]).strip(".-") or "problems"


def _records(source: str | ProblemSource) -> tuple[Numbered, str | None]:
    """Return a source's records, and the prefix of generated ids if it differs from the set's name."""
    found = find_source(source)
    if found is not None:
        return _called(found), None
    assert isinstance(source, str)
    if source.startswith(HUB):
        return read_hub(source), None
    path = Path(source).expanduser()
    if path.suffix.lower() in (".jsonl", ".csv", ".parquet") or path.exists():
        return read_file(path), path.stem[:100]
    hint = f". For a dataset of Hugging Face's, write {HUB}{source}" if re.fullmatch(r"[\w.-]+/[\w.-]+", source) else ""
    raise ProblemError(
        f"--problems: {source!r} is unknown; allowed are {', '.join(SOURCES.names)}, a .jsonl, .csv or .parquet file's path, "
        f"{HUB}OWNER/NAME, and a reference, module:name or path/to/file.py:name{hint}"
    )


def _called(found: Extension[Any]) -> Numbered:
    """Yield the records that a source's function returns, or that a reference names.

    Raises:
        ProblemError: if the function raises or returns something else; the message says what.
    """
    name = found.reference or found.name
    what = f"--problems: {name}"
    try:
        records = found.value() if callable(found.value) else found.value
    except ProblemError:
        raise
    except Exception as error:
        raise ProblemError(f"{what} raised {format_error(error)}") from error
    if isinstance(records, str | bytes | Mapping) or not isinstance(records, Iterable):
        raise ProblemError(
            f"{what} returned {preview(records)}; allowed is an iterable of records with 'question' and 'answer'"
        )
    stream, numbers = iter(records), count(1)
    while True:
        try:
            record = next(stream)
        except StopIteration:
            return
        except ProblemError:
            raise
        except Exception as error:
            raise ProblemError(f"{what} raised {format_error(error)}") from error
        number = next(numbers)
        yield number, f"{name}, record {number}", record


def _mapped(records: Numbered, columns: Mapping[str, str], fields: Sequence[str] | None) -> Numbered:
    """Yield records with renamed columns and only the selected additional fields.

    Raises:
        ProblemError: if a record lacks a column, or no record has a selected field.
    """
    unseen = dict.fromkeys(fields or ())
    there: dict[str, None] = {}
    kept = {"question", "answer", "solution", "problem_id", "template", *(fields or ())}
    for number, where, record in records:
        if not isinstance(record, Mapping):
            yield number, where, record
            continue
        if missing := [column for column in columns.values() if column not in record]:
            raise ProblemError(f"--columns: {where} has no column {missing[0]!r}; it has {', '.join(map(str, record))}")
        taken = set(columns.values()) | columns.keys()
        named = {key: value for key, value in record.items() if key not in taken}
        named |= {field: record[column] for field, column in columns.items()}
        if unseen:
            there |= dict.fromkeys(map(str, named))
            for name in named.keys() & unseen.keys():
                del unseen[name]
        yield number, where, {key: value for key, value in named.items() if fields is None or key in kept}
    if unseen and there:
        raise ProblemError(f"--fields: no record has a field {next(iter(unseen))!r}; allowed are {', '.join(there)}")


def arithmetic() -> Iterator[Record]:
    """Yield generated sums of 2 or 3 terms of 1 or 2 digits, which a very small model sometimes solves.

    Raises:
        ProblemError: if reasoning-gym is not installed.
    """
    for number, item, _ in _generated("arithmetic", "chain_sum", min_terms=2, max_terms=3, min_digits=1, max_digits=2):
        expression, gold = item["metadata"]["expression"], item["answer"]
        solution = f"{expression} = {gold}\n#### {gold}"
        yield {"problem_id": f"arithmetic-{number:04d}", "question": f"What is {expression}?", "answer": solution}


def gsm_symbolic() -> Iterator[Record]:
    """Yield problems made from the 100 templates of GSM-Symbolic (Mirzadeh et al. 2024, arXiv 2410.05229): GSM8K's own
    stories with other names and numbers, by reasoning-gym's generator.

    Raises:
        ProblemError: if reasoning-gym is not installed.
    """
    for number, item, template in _generated("gsm-symbolic", "gsm_symbolic"):
        yield {
            "problem_id": f"gsm-symbolic-{number:04d}",
            "question": item["question"],
            "answer": item["answer"],
            "solution": item["metadata"]["answer_cot"],
            "template": None if template is None else f"gsm-symbolic/{template}",
        }


def gsm8k() -> Iterator[Record]:
    """Yield GSM8K's test set, from the folder `$ROENTGEN_GSM8K_DIR` if set, otherwise from the hub.

    Raises:
        ProblemError: if neither can be read, or a line is malformed.
    """
    return _gsm8k("test")


def gsm8k_train() -> Iterator[Record]:
    """Yield GSM8K's training set, located like the test set.

    Raises:
        ProblemError: likewise.
    """
    return _gsm8k("train")


SOURCES: Registry[ProblemSource] = Registry(
    "roentgen.problems",
    {"arithmetic": arithmetic, "gsm8k": gsm8k, "gsm8k-train": gsm8k_train, "gsm-symbolic": gsm_symbolic},
)


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
        if item["question"] in seen:  # a duplicate question could end up on both sides of a split by problem
            continue
        seen.add(item["question"])
        yield next(numbers), item, None if templates is None else templates[place]


def _gsm8k(split: Literal["train", "test"]) -> Iterator[Record]:
    folder = os.environ.get(GSM8K_FOLDER_VARIABLE)
    lines = read_jsonl(Path(folder).expanduser() / f"{split}.jsonl") if folder else _gsm8k_from_hub(split)
    for number, where, record in lines:
        if gold_answer(str(record.get("answer"))) is None:
            raise ProblemError(f"{where}: 'answer' has no '#### <number>' line")
        yield {
            "problem_id": f"gsm8k-{split}-{number:04d}",
            "question": record.get("question"),
            "answer": record["answer"],
        }


def _gsm8k_from_hub(split: str) -> Numbered:
    try:
        rows = load_rows("openai/gsm8k", "main", split)
    except ProblemError as error:
        raise ProblemError(
            f"GSM8K cannot be loaded: the hub cannot be reached and ${GSM8K_FOLDER_VARIABLE} is not set. Either connect to "
            f"the hub, or set {GSM8K_FOLDER_VARIABLE} to a folder with GSM8K's train.jsonl and test.jsonl. ({error})"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield number, f"openai/gsm8k, row {number}", row
