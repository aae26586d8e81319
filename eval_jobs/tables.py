"""Reads records from files and from Hugging Face datasets.

A reader yields each record with its number and its name in error messages. Files are read and validated completely before
anything runs, so that a malformed line does not surface after an hour of GPU time.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from eval_jobs.records import CONSUMED, ProblemError

HUB = "hf:"
"""Prefix of a dataset's name."""

HUB_OPTIONS = ("config", "split", "revision")

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")  # 007 is a name

Numbered = Iterator[tuple[int, str, Any]]
"""Number, name in error messages, and record."""


def read_jsonl(path: Path) -> Numbered:
    """Yield the JSON objects of a file, one per line; numbers are line numbers, including empty lines.

    Raises:
        ProblemError: if the file cannot be read; the message names the line.
    """
    for number, line in enumerate(_bytes(path).split(b"\n"), start=1):
        if line.strip():
            yield number, f"{path.name}, line {number}", _json_line(line, f"{path.name}, line {number}")


def read_csv(path: Path) -> Numbered:
    """Yield the rows of a CSV file whose first line names the columns; every value is a text.

    A column without a name is skipped: pandas writes its index that way.

    Raises:
        ProblemError: if the file cannot be read; the message names the row.
    """
    try:
        reader = csv.DictReader(StringIO(_bytes(path).decode("utf-8-sig"), newline=""), strict=True)
        named = Counter(reader.fieldnames or ())
        if twice := [name for name, times in named.items() if times > 1]:
            raise ProblemError(f"{path.name}: several columns are named {twice[0]!r}")
        for number, row in enumerate(reader, start=1):
            where = f"{path.name}, row {number}"
            if None in row or None in row.values():
                raise ProblemError(
                    f"{where} has {'more' if None in row else 'fewer'} values than the first line has names"
                )
            row.pop("", None)
            yield number, where, row
    except (UnicodeDecodeError, csv.Error) as error:
        raise ProblemError(f"problems cannot be read: {path}: {error}") from error


def read_parquet(path: Path) -> Numbered:
    """Yield the rows of a parquet file.

    Raises:
        ProblemError: if it cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield number, f"{path.name}, row {number}", row
    except (OSError, pa.ArrowException) as error:
        raise ProblemError(f"problems cannot be read: {path}: {getattr(error, 'strerror', None) or error}") from error


FORMATS: dict[str, Callable[[Path], Numbered]] = {".jsonl": read_jsonl, ".csv": read_csv, ".parquet": read_parquet}
"""Readers of files by extension."""


def read_file(path: Path) -> Numbered:
    """Yield a file's records, in the format that its name ends in, or else a JSON object per line.

    Raises:
        ProblemError: if it cannot be read.
    """
    return FORMATS.get(path.suffix.lower(), read_jsonl)(path)


def hub_name(source: str) -> str:
    """Return the dataset's name in `hf:OWNER/NAME?split=test`, without the options."""
    return source.removeprefix(HUB).partition("?")[0]


def read_hub(source: str) -> Numbered:
    """Yield the rows of a dataset of the hub, or of a folder, using the library `datasets`.

    Args:
        source: `hf:OWNER/NAME?config=main&split=test`; the split is required if there are several.

    Raises:
        ProblemError: if it cannot be loaded; the message says what to do.
    """
    name, query = hub_name(source), source.partition("?")[2]
    asked = dict(parse_qsl(query, keep_blank_values=True))
    if unknown := sorted(asked.keys() - set(HUB_OPTIONS)):
        raise ProblemError(f"--problems: {source}: {unknown[0]!r} is unknown; allowed are {', '.join(HUB_OPTIONS)}")
    rows = load_rows(name, asked.get("config"), asked.get("split"), asked.get("revision"))
    for number, row in enumerate(rows, start=1):
        yield number, f"{name}, row {number}", row


def load_rows(
    name: str, config: str | None, split: str | None, revision: str | None = None
) -> Sequence[dict[str, Any]]:
    """Load the rows of a dataset.

    Raises:
        ProblemError: if it cannot be loaded.
    """
    try:
        import datasets
    except ImportError:
        raise ProblemError(f"{HUB}{name} needs the library datasets: pip install datasets") from None
    try:
        found: Sequence[dict[str, Any]] | dict[str, Sequence[dict[str, Any]]]
        found = datasets.load_dataset(name, config, split=split, revision=revision)
    except (OSError, ValueError) as error:  # no network, unknown dataset or split, or offline without a cached copy
        why = " ".join(str(error).split()).rstrip(".")
        raise ProblemError(
            f"{HUB}{name} cannot be loaded: {why}. Without a network, a dataset is read from the cache "
            f"of an earlier download ($HF_HOME), or from a folder ({HUB}path/to/folder)"
        ) from error
    if not isinstance(found, dict):
        return found
    if len(found) == 1:
        return next(iter(found.values()))
    raise ProblemError(f"{HUB}{name} has several splits: add ?split= and one of {', '.join(found)}")


def typed(records: Numbered) -> Numbered:
    """Yield text records with their additional fields typed: a column of numbers or booleans is converted, and an empty
    value becomes None."""
    rows = list(records)
    names = {name for _, _, row in rows for name in row} - CONSUMED
    readers = {name: _reader([row[name] for _, _, row in rows if row.get(name)]) for name in names}
    for number, where, row in rows:
        yield number, where, {n: (readers[n](v) if v else None) if n in readers else v for n, v in row.items()}


def _reader(values: Sequence[str]) -> Callable[[str], Any]:
    truths = {"true": True, "false": False}
    if values and all(value.lower() in truths for value in values):
        return lambda value: truths[value.lower()]
    if values and all(_NUMBER.fullmatch(value) for value in values):
        return int if all(value.lstrip("-").isdigit() for value in values) else float
    return str


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ProblemError(f"problems cannot be read: {path}: {error.strerror}") from error


def _json_line(line: bytes, where: str) -> Any:
    try:
        fields = json.loads(line)
        json.dumps(fields, ensure_ascii=False).encode()  # an unpaired surrogate could not be encoded
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON or bad Unicode
        raise ProblemError(f"{where}: not JSON: {error}{_a_list(line)}") from error
    if not isinstance(fields, dict):
        raise ProblemError(f"{where}: not a JSON object with 'question' and 'answer'{_a_list(line)}")
    return fields


def _a_list(line: bytes) -> str:
    return "; a file has one object per line, not a list of objects" if line.lstrip().startswith(b"[") else ""
