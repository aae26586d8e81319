"""Records out of files and out of Hugging Face's datasets.

A reader yields each record with its number and what messages call it. Files are read and checked whole before anything runs: a
broken line found after an hour of GPU time helps nobody.
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
"""How the name of a dataset begins."""

HUB_OPTIONS = ("config", "split", "revision")

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")  # 007 is a name

Numbered = Iterator[tuple[int, str, Any]]
"""Number, what messages call it, record."""


def read_jsonl(path: Path) -> Numbered:
    """Yield a file's lines, a JSON object each; numbers are those of lines, empty ones included.

    Raises:
        ProblemError: if it cannot be read, naming the line.
    """
    for number, line in enumerate(_bytes(path).split(b"\n"), start=1):
        if line.strip():
            yield number, f"{path.name}, line {number}", _json_line(line, f"{path.name}, line {number}")


def read_csv(path: Path) -> Numbered:
    """Yield the rows of a CSV file whose first line names the columns; every value is a text.

    A column without a name is left out: pandas writes its index so.

    Raises:
        ProblemError: if it cannot be read, naming the row.
    """
    try:
        reader = csv.DictReader(StringIO(_bytes(path).decode("utf-8-sig"), newline=""), strict=True)
        named = Counter(reader.fieldnames or ())
        if twice := [name for name, times in named.items() if times > 1]:
            raise ProblemError(f"{path.name}: several columns are called {twice[0]!r}")
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
"""Readers of files, by the end of the name."""


def read_file(path: Path) -> Numbered:
    """Yield a file's records, in the format that its name ends in, or else a JSON object per line.

    Raises:
        ProblemError: if it cannot be read.
    """
    return FORMATS.get(path.suffix.lower(), read_jsonl)(path)


def hub_name(source: str) -> str:
    """Return the dataset that `hf:OWNER/NAME?split=test` names, without what is asked of it."""
    return source.removeprefix(HUB).partition("?")[0]


def read_hub(source: str) -> Numbered:
    """Yield the rows of a dataset of the hub, or of a folder, as the library `datasets` reads it.

    Args:
        source: `hf:OWNER/NAME?config=main&split=test`; the split is needed where there are several.

    Raises:
        ProblemError: if it is not to be had, saying what can be done.
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
    """Return the rows of a dataset.

    Raises:
        ProblemError: if it is not to be had.
    """
    try:
        import datasets
    except ImportError:
        raise ProblemError(f"{HUB}{name} needs the library datasets: pip install datasets") from None
    try:
        found = datasets.load_dataset(name, config, split=split, revision=revision)
    except (OSError, ValueError) as error:  # no route, no such dataset or split, or offline without a cached copy
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
    """Yield records of texts with their further fields typed: a column of numbers or of truth values is one, and an empty value
    is None."""
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
        json.dumps(fields, ensure_ascii=False).encode()  # half an escaped character pair could not be sent
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON or bad Unicode
        raise ProblemError(f"{where}: not JSON: {error}{_a_list(line)}") from error
    if not isinstance(fields, dict):
        raise ProblemError(f"{where}: not a JSON object with 'question' and 'answer'{_a_list(line)}")
    return fields


def _a_list(line: bytes) -> str:
    return "; a file has an object a line, not a list of them" if line.lstrip().startswith(b"[") else ""
