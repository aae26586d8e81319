"""Writes a run: the directory, config.json, and the record.

Only the holder of the record's lock, inside `with recording(run) as record`, may modify an existing run.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import count
from pathlib import Path

from roentgen.atomic_files import atomic_write, make_folder, write_json
from roentgen.runs.config import RunConfig
from roentgen.runs.record import Recorder, RunError
from roentgen.runs.run import Run
from roentgen.runs.sample import Sample


def create_run(path: Path, config: RunConfig) -> Run:
    """Create a run directory at an absolute path.

    Raises:
        RunError: if the folder cannot be created or already holds a run.
    """
    if (path / "config.json").exists():
        raise RunError(f"{path} already holds a run")
    try:
        make_folder(path)
        write_json(path / "config.json", config.model_dump())
    except OSError as error:
        raise _not_writable(path, error) from error
    return Run(path, config)


def create_named_run(path: Path, config: RunConfig) -> Run:
    """Create a run directory with a timestamped name, and a number appended if another run started in the same second.

    Raises:
        RunError: if the folder cannot be created.
    """
    try:
        make_folder(path.parent)
        return create_run(_own_folder(path), config)
    except OSError as error:
        raise _not_writable(path, error) from error


def _own_folder(path: Path) -> Path:
    for number in count(1):
        own = path if number == 1 else path.with_name(f"{path.name}_{number}")
        with suppress(FileExistsError):
            own.mkdir()
            break
    return own


def _not_writable(path: Path, error: OSError) -> RunError:
    return RunError(f"run directory {path} is not writable: {error.strerror or error}; choose another --output")


def recording(run: Run) -> Recorder:
    """Return a recorder; entering it acquires the run's lock."""
    return Recorder(run.record_path)


def write_config(run: Run) -> None:
    """Rewrite config.json after a run has grown; the caller must hold the recorder.

    Raises:
        RunError: if it cannot be written.
    """
    try:
        write_json(run.path / "config.json", run.config.model_dump())
    except OSError as error:
        raise RunError(f"{run.path / 'config.json'} cannot be written: {error.strerror or error}") from error


def remove_if_empty(run: Run) -> bool:
    """Remove a run without samples, since its configuration alone cannot be continued. Return True if it was removed."""
    if run.record_path.exists() and run.record_path.stat().st_size:
        return False
    for file in (run.record_path, run.path / "config.json"):
        file.unlink(missing_ok=True)
    with suppress(OSError):  # the folder contains other files
        run.path.rmdir()
    return True


def rewrite(run: Run, change: Callable[[Sample], Sample], config: RunConfig) -> Run:
    """Rewrite a run's record atomically, applying a change to each sample, and its config.json.

    Raises:
        RunError: if an evaluation is writing the run, or the record is damaged.
    """
    return rewrite_all(run, lambda samples: map(change, samples), config)


def rewrite_all(run: Run, change: Callable[[Iterable[Sample]], Iterable[Sample]], config: RunConfig) -> Run:
    """Rewrite a run's record like `rewrite`, with a function of all samples.

    Raises:
        RunError: as for `rewrite`.
    """
    with recording(run):
        with atomic_write(run.record_path) as temporary, open(temporary, "wb") as file:
            file.writelines(sample.model_dump_json().encode() + b"\n" for sample in change(run.read_samples()))
        write_json(run.path / "config.json", config.model_dump())
    return Run(run.path, config)
