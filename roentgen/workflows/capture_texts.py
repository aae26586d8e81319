"""`roentgen capture`: reads texts, loads the model, skips texts that the session already has, and captures the others.

Everything that can be checked without the model is checked before it is loaded, and everything that can be checked without a
forward pass before the first one. The model runs in this process: there is no server, and nothing is generated.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from roentgen.contract import ActivationRequest, canonical_hash, quantize_again
from roentgen.defaults import EMBEDDED_MODEL, STORE
from roentgen.errors import RoentgenError
from roentgen.model_names import is_named
from roentgen.runs import Run
from roentgen.serving.preflight import PreflightError, check_device, with_option_names
from roentgen.store import Session, SessionNotFoundError, StoreWriter
from roentgen.store.storage_backends import StorageFolder, check_writable, open_folder
from roentgen.transcripts import Transcript, TranscriptError
from roentgen.transcripts.from_file import read_file
from roentgen.transcripts.from_run import read_run
from roentgen.workflows.command_settings import CaptureSettings
from serve_app.capture.resolver import ResolutionError
from serve_app.capture.rows import UncapturableError
from serve_app.capture.structure import CaptureRequestError
from serve_app.engines.protocol import Engine, EngineStoppedError
from serve_app.engines.transformers.engine import TransformersEngine
from serve_app.engines.transformers.loaded_model import LoadedModel, load
from serve_app.models.description import describe
from serve_app.models.errors import ModelNotFoundError
from serve_app.models.model_source import ModelSource, locate
from serve_app.teacher_forcing.already_captured import OtherCaptureError, find_missing
from serve_app.teacher_forcing.forced_capture import FailedText, StoredText, TeacherForcing
from serve_app.teacher_forcing.tokens import TokenizedTranscript, UnreadableTextError, transcript_tokenizer

SECONDS_BETWEEN_LINES = 5.0
"""Seconds between lines of progress without a terminal."""


class CaptureError(RoentgenError):
    """The capture cannot start or continue; the message says why and what to do."""


@dataclass
class CaptureReport:
    """The result of a capture."""

    session: str
    """The session's address."""
    run: Path | None
    """The run that the texts come from; None for a file."""
    held: int = 0
    """Number of texts that the session already had."""
    stored: int = 0
    """Number of captured texts."""
    tokens: int = 0
    """Number of tokens of the captured texts."""
    seconds: float = 0.0
    """Duration of the capture."""
    failures: list[tuple[str, str]] = field(default_factory=list)
    """Name and reason of each text that was not captured."""


def capture(settings: CaptureSettings, console: Console, stage: Callable[[str], None]) -> CaptureReport:
    """Capture a model's activations on existing texts; a second run continues.

    Args:
        settings: the command's settings.
        console: where to show progress.
        stage: called with each stage.

    Raises:
        RunError: if the run directory cannot be read.
        TranscriptError: if the texts cannot be read.
        StoreError: if the store cannot be read or written.
        CaptureError: if the model cannot be loaded or lacks a hook point, or the session belongs to another capture.
    """
    run = Run(settings.source) if settings.source.is_dir() else None
    if run is None and not settings.source.exists():
        raise TranscriptError(f"{settings.source} is neither a run directory nor a file")
    stage(f"reading {settings.source}")
    transcripts = read_run(run, stage) if run else read_file(settings.source)
    store = open_folder(settings.store or (_store_of(run) if run else None) or STORE)
    check_writable(store)
    with _as_capture_errors():
        model = _load(settings, run, stage)
        source = run.config.run_id if run else str(settings.source.absolute())
        stem = run.config.run_id if run else settings.source.stem
        session = settings.session or session_name(source, stem, settings.request, model)
        engine = TransformersEngine(
            model,
            max_batch=settings.batch,
            max_queue=settings.batch,
            max_prefill_tokens=settings.batch_tokens,
            prefix_cache=False,  # each text is read once, and most are scored
        )
        reader = Reader(model, engine, settings.request, chunk_size=settings.chunk_size)
        try:
            report = capture_into(store, session, reader, transcripts, console, stage)
        finally:
            engine.close()
    report.run = run.path if run else None
    return report


@dataclass(frozen=True)
class Reader:
    """A model that reads texts, and the request for activations."""

    model: LoadedModel
    engine: Engine
    """The engine that runs the model."""
    request: ActivationRequest
    """The request for activations."""
    chunk_size: int | None = None
    """Number of layers to capture per pass; None for all."""


def capture_into(
    store: StorageFolder,
    session: str,
    reader: Reader,
    transcripts: Sequence[Transcript],
    console: Console,
    stage: Callable[[str], None],
) -> CaptureReport:
    """Capture the texts that a session does not have yet.

    Raises:
        RequestError: if the model lacks a requested hook point, or the engine stops.
        OtherCaptureError: if the session has one of them, captured with other settings.
        StoreError: if the store cannot be read or written.
    """
    texts, failures = _tokenize(reader.model, transcripts, stage)
    report = CaptureReport(store.child(session).uri, None, failures=failures)
    with StoreWriter(store) as writer:
        forcing = TeacherForcing(
            reader.model, reader.engine, writer, reader.request, session, chunk_size=reader.chunk_size
        )
        held = find_missing(_existing(report.session), texts, forcing.spec)
        report.held = len(texts) - len(held.missing)
        if report.held:
            stage(f"{report.held} of {len(texts)} texts are in the session already")
        if held.changed:
            stage(f"{held.changed} texts have changed since: the session's older rollouts of them no longer count")
        if held.missing:
            stage(f"capturing {len(held.missing)} texts")
            _capture(forcing, held.missing, report, console)
    return report


def _load(settings: CaptureSettings, run: Run | None, stage: Callable[[str], None]) -> LoadedModel:
    """Load the requested model, or the run's own model with the run's settings."""
    hashed = run.config.hashed if run else {}
    own = run.config.model_root if run else EMBEDDED_MODEL
    is_own = run is not None and (settings.model is None or is_named(settings.model, (own, run.config.hashed["model"])))
    name = own if settings.model is None or is_own else settings.model
    revision, dtype, quantize = settings.revision, settings.dtype, settings.quantize
    if is_own:
        # Of a run's revisions only a hub's commit can be asked for; the others are hashes of what was there.
        quantize = quantize or quantize_again(hashed.get("quantization"))
        pinned = (hashed.get("revision") or "").removesuffix(f"-{quantize}")
        revision = revision or (pinned if re.fullmatch("[0-9a-f]{40}", pinned) else None)
        dtype = dtype or hashed.get("dtype")
    stage(f"finding {name}")
    check_device(settings.device)
    source: ModelSource = locate(name, revision, quantize=quantize)
    describe(source).check_capture(settings.layers, settings.hook_points)
    if is_own and hashed.get("revision") not in (None, source.revision):
        stage(f"the run's model was {hashed['revision']}; this is {source.revision}")
    return load(source, dtype or "auto", settings.device, stage)


def _existing(uri: str) -> Session | None:
    try:
        return Session.open(uri)
    except SessionNotFoundError:
        return None


def _store_of(run: Run) -> str | None:
    """Return the store of a run's activations; None if the run has none or they no longer exist."""
    for sample in run.read_samples():
        for ref in sample.rollouts:
            session = run.session_uri(ref)
            return session.rpartition("/")[0] if _existing(session) else None
    return None


def session_name(source: str, stem: str, request: ActivationRequest, model: LoadedModel) -> str:
    """Return a session name that is unique for the texts, the model and the request.

    Args:
        source: identifies the texts.
        stem: their name in the session's name.
        request: the request for activations.
        model: the model.
    """
    described: list[Any] = [source, model.source.name, model.source.revision, str(model.dtype)]
    described.append(request.model_dump(exclude={"allow_non_finite"}))
    parts = [re.sub(r"[^A-Za-z0-9_-]+", "-", part)[:size] for part, size in ((stem, 32), (model.source.name, 20))]
    return ".".join([*parts, canonical_hash(described)[:8]])


def _tokenize(
    model: LoadedModel, transcripts: Sequence[Transcript], stage: Callable[[str], None]
) -> tuple[list[TokenizedTranscript], list[tuple[str, str]]]:
    """Tokenize every transcript for the model; those that it cannot read are failures."""
    tokenize = transcript_tokenizer(model)
    texts: list[TokenizedTranscript] = []
    failures: list[tuple[str, str]] = []
    for transcript in transcripts:
        try:
            texts.append(tokenize(transcript))
        except UnreadableTextError as error:
            failures.append((transcript.name, str(error)))
    exact = sum(text.exact for text in texts)
    if exact:
        stage(f"{exact} of {len(texts)} texts have the very tokens that were sampled")
    return texts, failures


def _capture(
    forcing: TeacherForcing, texts: Sequence[TokenizedTranscript], report: CaptureReport, console: Console
) -> None:
    """Capture texts and count the results."""
    started = last_line = time.monotonic()
    bar = Progress(
        TextColumn("capturing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        disable=not console.is_terminal,
    )
    task = bar.add_task("capturing", total=len(texts), speed="")
    with bar:
        for number, outcome in enumerate(forcing.capture(texts), start=1):
            match outcome:
                case StoredText(text=text):
                    report.stored += 1
                    report.tokens += len(text.sequence.token_ids)
                case FailedText(text=text, reason=reason):
                    report.failures.append((text.transcript.name, reason))
            now = time.monotonic()
            report.seconds = now - started
            speed = f"{report.tokens / report.seconds:,.0f} tokens/s"
            bar.update(task, completed=number, speed=speed)
            if not console.is_terminal and (number == len(texts) or now - last_line > SECONDS_BETWEEN_LINES):
                last_line = now
                console.print(f"{number}/{len(texts)} texts, {speed}", markup=False, highlight=False)


@contextmanager
def _as_capture_errors() -> Iterator[None]:
    """Convert errors of the model and the engine to `CaptureError`."""
    try:
        yield
    except CaptureRequestError as error:
        raise CaptureError(with_option_names(str(error))) from error
    except UncapturableError as error:
        raise CaptureError(f"--hook-points: {error}") from error
    except (EngineStoppedError, ModelNotFoundError, OtherCaptureError, PreflightError, ResolutionError) as error:
        raise CaptureError(str(error)) from error
