"""The run directory and its config.json. Reading needs no lock; appending happens inside `with run.recording() as record`."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from roentgen.durable import atomic_write, make_folder, write_json
from roentgen.runs.record import Recorder, RunError, Samples, is_being_recorded, read_samples
from roentgen.runs.sample import RolloutRef, Sample


class RunConfig(BaseModel):
    """The contents of config.json."""

    run_id: str
    """Names the run and its session in the store."""
    created: str
    """ISO time."""
    config_hash: str
    """Hash of `hashed`."""
    hashed: dict[str, Any]
    """What makes two runs comparable: model, revision, dtype, prompt, variant, sampling, tools, capture."""
    problems: dict[str, Any]
    """Which problems: source, how many, how many samples each."""
    settings: dict[str, Any]
    """Everything else: parallelism, addresses, scoring."""
    prompt: dict[str, Any]
    """The prompt's text, as data."""
    versions: dict[str, str]
    """Of the packages that matter."""
    git_revision: str | None = None
    """Of the working tree, if it is one."""
    variants: dict[str, dict[str, str]] = Field(default_factory=dict)
    """Of a run that poses its problems under several prompt prefixes, each one's `prefix` and `config_hash`."""

    @property
    def set_name(self) -> str:
        """What its samples are called after; those of older runs are all called after GSM8K."""
        return str(self.problems.get("name") or "gsm8k")

    @property
    def model_root(self) -> str:
        """What its model can be loaded from; runs of older versions have only the name that they were given."""
        served = self.settings.get("served") or {}
        return str(served.get("root") or self.settings.get("model") or self.hashed["model"])

    @property
    def config_hashes(self) -> list[str]:
        """The hashes that its samples may carry: one per variant, or the run's own."""
        return [variant["config_hash"] for variant in self.variants.values()] or [self.config_hash]


class Run:
    """One run directory."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path = path
        self.config = config

    @classmethod
    def create(cls, path: Path, config: RunConfig) -> "Run":
        """Make a run directory at an absolute path.

        Raises:
            RunError: if the folder cannot be made or holds a run already.
        """
        if (path / "config.json").exists():
            raise RunError(f"{path} already holds a run")
        try:
            make_folder(path)
            write_json(path / "config.json", config.model_dump())
        except OSError as error:
            raise RunError(
                f"run directory {path} is not writable: {error.strerror or error}; choose another --output"
            ) from error
        return cls(path, config)

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """Open a run directory.

        Raises:
            RunError: if there is no run, or its config.json is damaged.
        """
        folder = Path(path).expanduser().absolute()
        try:
            config = RunConfig.model_validate_json((folder / "config.json").read_bytes())
        except FileNotFoundError:
            raise RunError(f"{folder} is not a run directory: it has no config.json") from None
        except ValidationError as error:
            raise RunError(f"{folder / 'config.json'} is damaged: {error}") from error
        return cls(folder, config)

    @property
    def record_path(self) -> Path:
        """The append-only record."""
        return self.path / "samples.jsonl"

    def samples(self) -> Samples:
        """Return the record: each sample once, its first answer or, if it has none, its last error.

        A torn last line (a crash while it was written) is skipped.

        Raises:
            RunError: if any other line is not a sample, naming the line; a line is checked in full when it is read.
        """
        return read_samples(self.record_path, self.config.config_hashes)

    @property
    def is_running(self) -> bool:
        """Whether an evaluation is recording into it."""
        return is_being_recorded(self.record_path)

    def recording(self) -> Recorder:
        """Return a recorder; entering it takes the run's lock."""
        return Recorder(self.record_path)

    def summary(self) -> dict[str, Any] | None:
        """Return summary.json, or None before it is written."""
        file = self.path / "summary.json"
        summary: dict[str, Any] | None = json.loads(file.read_text()) if file.exists() else None
        return summary

    def write_config(self) -> None:
        """Write config.json again, after a run has grown; for whoever holds the recorder.

        Raises:
            RunError: if it cannot be written.
        """
        try:
            write_json(self.path / "config.json", self.config.model_dump())
        except OSError as error:
            raise RunError(f"{self.path / 'config.json'} cannot be written: {error.strerror or error}") from error

    def remove_if_empty(self) -> bool:
        """Remove a run without a sample: its configuration alone is nothing to go on with. Whether it was."""
        if self.record_path.exists() and self.record_path.stat().st_size:
            return False
        for file in (self.record_path, self.path / "config.json"):
            file.unlink(missing_ok=True)
        with suppress(OSError):  # somebody has put something of their own there
            self.path.rmdir()
        return True

    def session_uri(self, ref: RolloutRef) -> str:
        """Return where a rollout's session is: where it was written or, if that folder is gone, inside the run, which may
        have been moved."""
        inside = self.path / "activations" / ref.session_id
        return str(inside) if inside.is_dir() and not Path(ref.uri).is_dir() else ref.uri

    def probe_folders(self) -> list[Path]:
        """Return the folders of probe results, in order of label."""
        return sorted(path.parent for path in (self.path / "probes").glob("*/results.json"))


def rewrite(run: Run, change: Callable[[Sample], Sample], config: RunConfig) -> Run:
    """Write a run's record again, each sample changed, and its config.json; whole or not at all.

    Raises:
        RunError: if an evaluation is writing the run, or the record is damaged.
    """
    with run.recording():
        with atomic_write(run.record_path) as temporary, open(temporary, "wb") as file:
            file.writelines(change(sample).model_dump_json().encode() + b"\n" for sample in run.samples())
        write_json(run.path / "config.json", config.model_dump())
    return Run(run.path, config)


def find_unfinished(results: Path, config_hash: str, problems: dict[str, Any]) -> Run | None:
    """Return the newest run under `results` of this configuration and these problems that is not complete."""
    candidates = []
    for file in results.glob("*/config.json"):
        run = Run.open(file.parent)
        summary = run.summary()
        if (
            run.config.config_hash == config_hash
            and {**run.config.problems, "name": None} == {**problems, "name": None}
            and not (summary or {}).get("complete")
        ):
            candidates.append(run)
    return max(candidates, key=lambda run: run.config.created, default=None)
