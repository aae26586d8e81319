"""The run directory: what an evaluation leaves on disk, and how it is read back.

    RUN/
      config.json                  all that is needed to run it again; written once
      samples.jsonl                the record: append-only, a line per sample, fsynced; the source of truth
      summary.json  dataset.jsonl  report.html
      samples/gsm8k_0001.json  trajectories/gsm8k_0001.jsonl  agent_states/gsm8k_0001.json
      probes/<label>/              what `roentgen probe train` found

Everything but config.json and samples.jsonl can be made again from those two. A driver that dies leaves at most a torn last
line, which the next one cuts off; a lock keeps two drivers from one run.
"""

import fcntl
import json
import os
import uuid
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from roentgen.contract import ActivationReply


class RunError(Exception):
    """A run directory cannot be used; the message names the file and what to do."""


class RolloutRef(ActivationReply):
    """Where the activations of one turn are: the server's reply, and which turn it answered."""

    turn: int


class Sample(BaseModel):
    """One attempt at one problem.

    Attributes:
        sample_id: names its files, "gsm8k_0001".
        problem_id: the problem, stable across runs.
        epoch: which of several attempts, from 1.
        config_hash: the configuration it was made under; with problem_id and epoch it is the sample's identity.
        question: as posed.
        solution: the gold rationale.
        gold: the gold answer.
        messages: the conversation, the model's last message included.
        response: the model's last message.
        answers: what each extractor read, None where it found nothing.
        correct_by: each extractor's verdict.
        correct: the primary extractor's verdict.
        finish_reason: "stop", or "length" if it was cut.
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens generated.
        seconds: wall time of the request.
        rollouts: where its activations are, one per turn.
        error: why there is no answer; such a sample is tried again on resume.
    """

    model_config = ConfigDict(frozen=True)

    sample_id: str
    problem_id: str
    epoch: int = 1
    config_hash: str
    question: str
    solution: str
    gold: str
    messages: list[dict[str, Any]] = Field(default_factory=list)
    response: str = ""
    answers: dict[str, str | None] = Field(default_factory=dict)
    correct_by: dict[str, bool] = Field(default_factory=dict)
    correct: bool = False
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    rollouts: list[RolloutRef] = Field(default_factory=list)
    error: str | None = None

    @property
    def identity(self) -> tuple[str, str, int]:
        """What makes it the same sample when it is tried again."""
        return self.config_hash, self.problem_id, self.epoch


class RunConfig(BaseModel):
    """The contents of config.json.

    Attributes:
        run_id: names the run and its session in the store.
        created: ISO time.
        config_hash: hash of `hashed`.
        hashed: what makes two runs comparable: model, revision, dtype, prompt, variant, sampling, tools, capture.
        problems: which problems: source and how many.
        settings: everything else: parallelism, addresses, scoring.
        prompt: the prompt's text, as data.
        versions: of the packages that matter.
        git_revision: of the working tree, if it is one.
    """

    run_id: str
    created: str
    config_hash: str
    hashed: dict[str, Any]
    problems: dict[str, Any]
    settings: dict[str, Any]
    prompt: dict[str, Any]
    versions: dict[str, str]
    git_revision: str | None = None


class Run:
    """One run directory. Reading needs no lock; appending happens inside `with run.recording() as record`."""

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
            path.mkdir(parents=True, exist_ok=True)
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

    def samples(self) -> list[Sample]:
        """Read the record: each sample once; an answer counts before an error, the first answer before later ones.

        A torn last line (a crash while it was written) is skipped.

        Raises:
            RunError: if any other line is not a sample, naming the line.
        """
        found: dict[tuple[str, str, int], Sample] = {}
        for sample in _read_record(self.record_path):
            kept = found.get(sample.identity)
            if kept is None or (kept.error is not None):
                found[sample.identity] = sample
        return list(found.values())

    def recording(self) -> "Recorder":
        """Return a recorder; entering it takes the run's lock."""
        return Recorder(self)

    def summary(self) -> dict[str, Any] | None:
        """Return summary.json, or None before it is written."""
        file = self.path / "summary.json"
        summary: dict[str, Any] | None = json.loads(file.read_text()) if file.exists() else None
        return summary

    def session_uri(self, ref: RolloutRef) -> str:
        """Return where a rollout's session is: where it was written or, if that folder is gone, inside the run, which may
        have been moved."""
        inside = self.path / "activations" / ref.session_id
        return str(inside) if inside.is_dir() and not Path(ref.uri).is_dir() else ref.uri

    def probe_folders(self) -> list[Path]:
        """Return the folders of probe results, in order of label."""
        return sorted(path.parent for path in (self.path / "probes").glob("*/results.json"))


class Recorder:
    """Appends samples to a run's record, durably, while it holds the run's lock."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        file = open(self._run.record_path, "ab+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise RunError(f"{self._run.path} is being written by another evaluation") from None
        _cut_torn_line(file)
        self._file = file
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def append(self, sample: Sample) -> None:
        """Add a sample; when this returns, it is on the disk."""
        if self._file is None:
            raise RunError("the recorder is not entered")
        self._file.write(sample.model_dump_json().encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _cut_torn_line(file: IO[bytes]) -> None:
    """Cut what follows the last newline: a line that a crash left half written, and that nobody was told of."""
    file.seek(0)
    whole = file.read().rfind(b"\n") + 1
    file.truncate(whole)
    file.seek(whole)


def _read_record(path: Path) -> list[Sample]:
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    samples = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is empty or torn
        try:
            samples.append(Sample.model_validate_json(line))
        except ValidationError as error:
            raise RunError(f"{path}, line {number} is not a sample: {error.errors()[0]['msg']}") from error
    return samples


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    os.replace(temporary, path)


def find_unfinished(results: Path, config_hash: str, problems: dict[str, Any]) -> Run | None:
    """Return the newest run under `results` of this configuration and these problems that is not complete."""
    candidates = []
    for file in results.glob("*/config.json"):
        run = Run.open(file.parent)
        summary = run.summary()
        if (
            run.config.config_hash == config_hash
            and run.config.problems == problems
            and not (summary or {}).get("complete")
        ):
            candidates.append(run)
    return max(candidates, key=lambda run: run.config.created, default=None)
