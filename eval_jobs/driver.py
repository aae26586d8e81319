"""The evaluation, step by step: query the server, open the run, run the missing attempts, write the results.

The driver is the only process that writes the run directory. It appends each sample durably to the record before it does
anything else with it, so a crash loses only the rollouts in flight; every other file is derived from the record. Running
again with the same settings continues.
"""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from threading import Event, current_thread, main_thread
from types import FrameType

from rich.console import Console

from eval_jobs import EvalError, InterruptedRunError
from eval_jobs.endpoint import Endpoint, FatalRequestError, find_model, resolve_endpoint
from eval_jobs.estimate import estimate
from eval_jobs.extractors import EXTRACTORS, choose_scorer
from eval_jobs.fanout import evaluate
from eval_jobs.hashed_config import ServedModelInfo, hashed_configuration, variants_of
from eval_jobs.outputs import Timing, write_missing_sample_files, write_sample_files, write_summary
from eval_jobs.problems import Problem, describe_source
from eval_jobs.progress import Progress, Tally
from eval_jobs.report import write_report
from eval_jobs.resume import keep_recorded_settings, open_run
from eval_jobs.rollout import RolloutPlan
from eval_jobs.server_token_counter import ServerTokenCounter
from eval_jobs.settings import EvalSettings
from eval_jobs.summary import expected_samples
from eval_jobs.terminal_summary import print_line
from eval_jobs.tools import TOOLS
from eval_jobs.variants import Attempt, attempts_of
from roentgen.api_keys import client_key
from roentgen.contract import ActivationRequest, canonical_hash
from roentgen.ray_connection import LOCAL, ClusterError, connected
from roentgen.runs import Recorder, Run, Sample, recording, remove_if_empty, write_config
from roentgen.runs.failures import Failures
from roentgen.stages import Stages

MAX_FAILED_IN_A_ROW = 10
"""Number of consecutive failures after which the run stops: they are unlikely to be caused by the problems, and each may
have cost a minute of retries."""


MANY = 500
"""Number of samples from which writing the summary and the page takes noticeable time."""


class TooManyFailuresError(EvalError):
    """The run stopped because too many samples failed; the message says how many, and with which error."""


def run_evaluation(
    settings: EvalSettings,
    problems: Sequence[Problem],
    base_url: str,
    console: Console,
    stop: Event | None = None,
    *,
    is_own: bool = False,
) -> Run:
    """Run an evaluation, continuing an existing run if there is one; return the run, complete or with failed samples.

    Args:
        settings: the settings.
        problems: the problems, from `load_problems(settings.selection)`.
        base_url: the server, http://HOST:PORT/v1.
        console: the console that shows progress.
        stop: stops the evaluation when set; used instead of signals, which only the main thread receives.
        is_own: True if the server was started for this evaluation. Tasks on a Ray cluster that the environment names may
            not reach it, so they run on this machine unless the settings name a cluster.

    Raises:
        EvalError: if the server, Ray or the run directory cannot be used, or the evaluation is stopped (Ctrl-C, SIGTERM);
            recorded samples are kept.
        RunError: if the run directory cannot be used.
    """
    settings = keep_recorded_settings(settings).suited_to(problems)
    endpoint, served, settings = prepare(settings, base_url, lambda text: print_line(console, text))
    run = open_run(settings, problems, served, endpoint.base_url)
    plan = _plan(settings, endpoint, served.id, run)
    attempts = attempts_of(run.config, problems)
    with recording(run) as record, _remove_empty_run(run):
        previous = Run(run.path).config
        if previous != run.config:
            write_config(run)
            before, now = expected_samples(previous), expected_samples(run.config)
            print_line(console, f"the run grows from {before} to {now} samples")
        recorded, tally = _recorded(run)
        missing = [attempt for attempt in attempts if attempt.identity not in recorded]
        _announce(run, settings, problems, attempts, missing, console)
        timing = None
        if missing:
            with (
                closing(ServerTokenCounter(endpoint)) as counter,
                Progress(console, len(attempts), tally, counter.tokens) as bar,
                connected(
                    settings.ray_address or (LOCAL if is_own else None), verbose=settings.verbose, starting=bar.begin
                ),
                _stop_requests(stop) as check_stop,
            ):
                bar.begin("evaluating")
                timing = _run_missing(missing, plan, settings, run, record, bar, check_stop)
    with _writing(run), Stages(console) as stage:
        if len(attempts) > MANY:
            stage(f"writing the summary and the report of {len(attempts):,} samples")
        write_missing_sample_files(run)
        write_summary(run, timing)
        write_report(run)
    return run


def describe(settings: EvalSettings, problems: Sequence[Problem], base_url: str, console: Console) -> None:
    """Print what an evaluation would run and store, without running it.

    Raises:
        EvalError: if the server or the file of variants cannot be used.
    """
    endpoint, served, settings = prepare(settings.suited_to(problems), base_url, lambda text: print_line(console, text))
    hashed = hashed_configuration(settings, served)
    variants = variants_of(settings, hashed)
    samples = len(problems) * settings.epochs * len(variants)
    print_line(
        console,
        f"configuration {canonical_hash(hashed)}: {served.id}, prompt {settings.chosen_prompt.name}, {settings.mode}",
    )
    print_line(
        console, f"{samples} samples: {len(problems)} problems × {settings.epochs} epochs × {len(variants)} variants"
    )
    stored = estimate(settings, served, endpoint, problems, len(variants))
    print_line(console, "activations: none" if stored is None else str(stored))


def prepare(
    settings: EvalSettings, base_url: str, notify: Callable[[str], None]
) -> tuple[Endpoint, ServedModelInfo, EvalSettings]:
    """Query the server for its model; return both, and the settings without what the server does not support.

    Args:
        settings: the requested settings.
        base_url: the server.
        notify: called with a line about each unsupported setting.

    Raises:
        FatalRequestError: if no server answers, the server does not serve the model, or the model lacks a layer to capture.
    """
    endpoint = resolve_endpoint(Endpoint(base_url, timeout=settings.request_timeout, api_key=client_key()))
    served = find_model(endpoint, settings.model)
    if settings.collect_activations and served.d_model is None:
        notify(f"the server at {base_url} is not a Roentgen server: activations are not stored")
        settings = settings.model_copy(update={"collect_activations": False})
    if settings.collect_activations and served.num_layers is not None and settings.layers != "all":
        for layer in settings.layers:
            if not -served.num_layers <= layer < served.num_layers:
                raise FatalRequestError(
                    f'--layers: {layer} is out of range; {served.id} has layers 0–{served.num_layers - 1} (or "all")'
                )
    return endpoint, served, settings


def _plan(settings: EvalSettings, endpoint: Endpoint, model: str, run: Run) -> RolloutPlan:
    capture = None
    if settings.capture is not None:
        capture = ActivationRequest(session_id=run.config.run_id, **settings.capture)
    with_tools = settings.mode == "with-tools"
    primary = run.config.settings["extractor"]
    return RolloutPlan(
        endpoint=endpoint,
        model=model,
        prompt=settings.chosen_prompt,
        sampling=settings.sampling,
        extractor=primary,
        scorers={primary: choose_scorer(primary if primary in EXTRACTORS else settings.extractor or primary).value},
        tools=tuple(TOOLS) if with_tools else (),
        max_turns=settings.max_turns if with_tools else 1,
        capture=capture,
    )


def _recorded(run: Run) -> tuple[set[tuple[str, str, int]], Tally]:
    """Return the identities of the answered attempts, and their tally."""
    answered, tally = set(), Tally()
    for sample in run.read_samples():
        if sample.error is None:
            answered.add(sample.identity)
            tally.add(sample)
    return answered, tally


def _announce(
    run: Run,
    settings: EvalSettings,
    problems: Sequence[Problem],
    attempts: Sequence[Attempt],
    missing: Sequence[Attempt],
    console: Console,
) -> None:
    if settings.sample_ids is None and len(problems) < settings.samples:
        print_line(
            console,
            f"{describe_source(settings.problems)} has only {len(problems)} of the {settings.samples} problems requested: "
            "evaluating all of them",
        )
    if settings.epochs > 1 and settings.temperature == 0:
        print_line(console, f"{settings.epochs} epochs at temperature 0: all samples of a problem will be identical")
    print_line(console, f"run directory: {run.path}")
    extractor = run.config.settings["extractor"]
    if settings.extractor is None and extractor != settings.chosen_prompt.extractor:
        print_line(console, f"the run was started with the extractor {extractor} and keeps it")
    what = "problems" if len(attempts) == len(problems) else "samples"
    if not missing:
        print_line(console, f"all {len(attempts)} {what} are already recorded: nothing to run")
    elif len(missing) < len(attempts):
        print_line(
            console, f"continuing: {len(attempts) - len(missing)} of {len(attempts)} {what} are already recorded"
        )


def _run_missing(
    missing: Sequence[Attempt],
    plan: RolloutPlan,
    settings: EvalSettings,
    run: Run,
    record: Recorder,
    progress: Progress,
    check_stop: Callable[[], None],
) -> Timing:
    """Run the missing attempts; return the timing.

    Raises:
        EvalError: if the run has to stop; the message says how to continue.
    """
    started = time.monotonic()
    recorded = failed = failed_in_a_row = tokens = 0
    failures = Failures()
    what = "problems" if settings.epochs == 1 and not run.config.variants else "samples"
    resume_hint = partial(_resume_hint, run, settings.new)

    def keep(sample: Sample) -> None:
        nonlocal recorded, failed, failed_in_a_row, tokens
        with _writing(run):
            record.append(sample)
            write_sample_files(run, sample)
        progress.add(sample)
        recorded += 1
        tokens += sample.completion_tokens
        failed += sample.error is not None
        failed_in_a_row = 0 if sample.error is None else failed_in_a_row + 1
        if sample.error is not None:
            failures.add(sample.sample_id, sample.error)
        if failed_in_a_row == MAX_FAILED_IN_A_ROW:
            raise TooManyFailuresError(f"the last {failed_in_a_row} {what} failed, {failures.describe_last()}")
        if failed == settings.fail_on_error:
            raise TooManyFailuresError(f"{failed} samples failed (--fail-on-error), {failures.describe_last()}")

    try:
        evaluate(missing, plan, settings.parallel, keep, check_stop)
    except KeyboardInterrupt:
        raise InterruptedRunError(f"interrupted. {resume_hint()}") from None
    except TooManyFailuresError as error:
        with _writing(run):  # the report lists the failures
            write_summary(run, Timing(time.monotonic() - started, recorded, tokens))
            write_report(run)
        raise EvalError(f"{error}. {resume_hint()} {failures.commonest_first()[0].advice}") from error
    except EvalError as error:
        raise EvalError(f"{error}. {resume_hint()}") from error
    return Timing(time.monotonic() - started, len(missing), tokens)


@contextmanager
def _remove_empty_run(run: Run) -> Iterator[None]:
    """Remove the run directory if the evaluation ends before it has recorded a sample."""
    try:
        yield
    except (EvalError, ClusterError, KeyboardInterrupt):
        remove_if_empty(run)
        raise


@contextmanager
def _stop_requests(stop: Event | None) -> Iterator[Callable[[], None]]:
    """Yield a check that raises KeyboardInterrupt after Ctrl-C or SIGTERM (a stopped job, a reclaimed machine).

    The signal handler only sets a flag. An exception raised in the handler could interrupt Ray or the writing of a sample's
    files, and could be swallowed there. A second signal raises at once. If `stop` is given, the check tests only that
    event, because only the main thread receives signals.
    """
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    def check_stop() -> None:
        if asked or (stop is not None and stop.is_set()):
            raise KeyboardInterrupt

    if stop is not None or current_thread() is not main_thread():
        yield check_stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # ignored signals stay ignored, as for a shell's background jobs
            signal.signal(number, note)
    try:
        yield check_stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _writing(run: Run) -> Iterator[None]:
    """Turn an OSError, such as a full or read-only disk, into an EvalError."""
    try:
        yield
    except OSError as error:
        raise EvalError(f"{error.filename or run.path} cannot be written: {error.strerror}") from error


def _resume_hint(run: Run, new: bool) -> str:
    if not len(run.read_samples()):
        return "No sample was recorded."
    again = "run the same command without --new to continue" if new else "run the same command to continue"
    return f"Finished samples are in {run.path}; {again}."
