"""The record of a run, `samples.jsonl`: one line per sample, appended durably by one process and read by any.

A driver that dies leaves at most a torn last line, which the next driver truncates; a lock prevents two drivers from
writing one run. Samples are read one at a time: memory holds only the location of each line, so that a small machine can
read a run of a hundred thousand problems.
"""

import fcntl
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self, overload

from pydantic import BaseModel, ValidationError

from roentgen.atomic_files import sync_folder
from roentgen.errors import RoentgenError
from roentgen.runs.sample import Sample

BLOCK = 1 << 16
"""Bytes read at a time when a file is read from its end."""

_SUFFIX = re.compile(r"(_e[0-9]+)?(_v-.*)?$")
"""Suffix of a sample's name with its epoch and variant: `gsm8k_0001_e2_v-calm`."""


class RunError(RoentgenError):
    """The run directory cannot be used; the message names the file and what to do."""


class Recorder:
    """Appends samples durably to a run's record while it holds the run's lock."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        created = not self._path.exists()
        file = open(self._path, "ab+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise RunError(f"{self._path.parent} is being written by another evaluation") from None
        _cut_torn_line(file)
        if created:
            sync_folder(self._path.parent)
        self._file = file
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def append(self, sample: Sample) -> None:
        """Append a sample; it is on disk when this returns."""
        if self._file is None:
            raise RunError("the recorder is not entered")
        self._file.write(sample.model_dump_json().encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def is_being_recorded(path: Path) -> bool:
    """Return True if a recorder holds the record's lock."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


@dataclass(frozen=True, slots=True)
class _SampleLocation:
    """The location of a sample in the record."""

    line: int
    """Line number, from 1."""
    offset: int
    """Offset in bytes."""
    sample_id: str
    """The sample's name."""
    epoch: int
    """Number of the attempt."""
    variant: int
    """Index of its configuration among the run's variants, in declaration order."""
    failed: bool
    """True if it has no answer."""

    @property
    def order(self) -> tuple[list[tuple[int, str]], int, int]:
        """Sort key: by problem, then epoch, then variant, which is the order in which a run poses them."""
        return natural_order(_SUFFIX.sub("", self.sample_id)), self.epoch, self.variant


class _Head(BaseModel):
    """The fields of a sample needed to locate it."""

    sample_id: str
    problem_id: str
    epoch: int = 1
    config_hash: str
    error: str | None = None


class Samples(Sequence[Sample]):
    """The samples of a record, read from disk one at a time on each access."""

    def __init__(self, path: Path, locations: Sequence[_SampleLocation]) -> None:
        self._path = path
        self._locations = locations

    def __len__(self) -> int:
        return len(self._locations)

    @overload
    def __getitem__(self, which: int) -> Sample: ...

    @overload
    def __getitem__(self, which: slice) -> "Samples": ...

    def __getitem__(self, which: int | slice) -> "Sample | Samples":
        if isinstance(which, slice):
            return Samples(self._path, self._locations[which])
        return next(self._read([self._locations[which]]))

    def __iter__(self) -> Iterator[Sample]:
        return self._read(self._locations)

    @property
    def names(self) -> list[str]:
        """Their names in the same order, without reading the samples."""
        return [location.sample_id for location in self._locations]

    def by_name(self) -> "Samples":
        """Return them sorted by problem, epoch and variant (as declared), independent of the order in which they finished."""
        return Samples(self._path, sorted(self._locations, key=lambda location: location.order))

    def _read(self, locations: Iterable[_SampleLocation]) -> Iterator[Sample]:
        if not self._locations:
            return
        with open(self._path, "rb") as file:
            for location in locations:
                file.seek(location.offset)
                try:
                    yield Sample.model_validate_json(file.readline())
                except ValidationError as error:
                    raise _damaged(self._path, location.line, error) from error


def read_samples(path: Path, config_hashes: Sequence[str] = ()) -> Samples:
    """Locate the line of each sample: its first answer or, without one, its last error.

    Args:
        path: the record.
        config_hashes: the hashes of the run's variants, in declaration order.

    Raises:
        RunError: if a line other than a torn last one is not a sample.
    """
    found: dict[tuple[str, str, int], _SampleLocation] = {}
    variants = {config_hash: number for number, config_hash in enumerate(config_hashes)}
    if not path.exists():
        return Samples(path, [])
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break  # torn
            try:
                head = _Head.model_validate_json(line)
            except ValidationError as error:
                raise _damaged(path, number, error) from error
            identity = (head.config_hash, head.problem_id, head.epoch)
            if identity not in found or found[identity].failed:
                variant = variants.get(head.config_hash, len(variants))
                found[identity] = _SampleLocation(
                    number, offset, head.sample_id, head.epoch, variant, head.error is not None
                )
            offset += len(line)
    return Samples(path, list(found.values()))


def _damaged(path: Path, line: int, error: ValidationError) -> RunError:
    return RunError(f"{path}, line {line} is not a sample: {error.errors()[0]['msg']}")


def natural_order(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts gsm8k_999 before gsm8k_1000."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def _cut_torn_line(file: IO[bytes]) -> None:
    """Truncate the file after the last newline: a partial line was left by a crash and was never acknowledged."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - BLOCK)
        file.seek(start)
        if (found := file.read(end - start).rfind(b"\n")) >= 0:
            end = start + found + 1
            break
        end = start
    file.truncate(end)
    file.seek(end)
