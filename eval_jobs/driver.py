"""The evaluation in order: ask the server, open the run, run what is missing, write down what came of it.

The driver is the only process that writes the run directory. A sample is appended to the record, durably, before anything
else is done with it, so a crash costs the rollouts in flight and nothing more; everything else on disk is made from the
record. Starting again with the same settings continues.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console

from eval_jobs import EvalError
from eval_jobs.config import EvalSettings
from eval_jobs.endpoint import Endpoint, api_key, find_model
from eval_jobs.fanout import evaluate
from eval_jobs.outputs import Timing, write_missing_sample_files, write_sample_files, write_summary
from eval_jobs.problems import Problem
from eval_jobs.progress import Progress
from eval_jobs.report import write_report
from eval_jobs.resume import open_run
from eval_jobs.rollout import RolloutPlan
from roentgen.cluster import connected
from roentgen.contract import ActivationRequest
from roentgen.runs import Recorder, Run, Sample

MAX_FAILED_IN_A_ROW = 10
"""So many failures on end are no property of the problems; each may have cost a minute of retries, so the run stops."""


class InterruptedRunError(EvalError):
    """Ctrl-C; the message says how to go on."""

    exit_code = 130


def run_evaluation(settings: EvalSettings, problems: Sequence[Problem], base_url: str, console: Console) -> Run:
    """Evaluate, continuing a run if there is one to continue; return the run, complete or with failed samples.

    Args:
        settings: what to do.
        problems: on what; `load_problems(settings.problems, settings.samples)`.
        base_url: the server, http://HOST:PORT/v1.
        console: where progress is shown.

    Raises:
        EvalError: if the server, Ray or the run directory cannot be used, or on Ctrl-C; what is recorded stays.
        RunError: if the run directory cannot be used.
    """
    endpoint = Endpoint(base_url, timeout=settings.request_timeout, api_key=api_key())
    served = find_model(endpoint, settings.model)
    run = open_run(settings, problems, served, base_url)
    plan = _plan(settings, endpoint, served.id, run)
    with run.recording() as record:
        recorded = [sample for sample in run.samples() if sample.error is None]
        done = {sample.problem_id for sample in recorded}
        missing = [problem for problem in problems if problem.problem_id not in done]
        _announce(run, settings, problems, missing, console)
        timing = None
        if missing:
            with (
                connected(settings.ray_address, verbose=settings.verbose),
                Progress(console, len(problems), recorded) as bar,
            ):
                timing = _run_missing(missing, plan, settings.parallel, run, record, bar)
    with _writing(run):
        write_missing_sample_files(run)
        write_summary(run, timing)
        write_report(run)
    return run


def _plan(settings: EvalSettings, endpoint: Endpoint, model: str, run: Run) -> RolloutPlan:
    capture = None
    if settings.capture is not None:
        capture = ActivationRequest(session_id=run.config.run_id, **settings.capture)
    return RolloutPlan(
        endpoint=endpoint,
        model=model,
        prompt=settings.prompt,
        sampling=settings.sampling,
        extractor=settings.extractor,
        config_hash=run.config.config_hash,
        capture=capture,
    )


def _announce(
    run: Run, settings: EvalSettings, problems: Sequence[Problem], missing: Sequence[Problem], console: Console
) -> None:
    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    if len(problems) < settings.samples:
        say(f"{settings.problems} has {len(problems)} problems, fewer than --samples {settings.samples}: all are used")
    say(f"run directory: {run.path}")
    if not missing:
        say(f"all {len(problems)} problems are recorded already: nothing to run")
    elif len(missing) < len(problems):
        say(f"continuing: {len(problems) - len(missing)} of {len(problems)} problems are recorded already")


def _run_missing(
    missing: Sequence[Problem], plan: RolloutPlan, parallel: int, run: Run, record: Recorder, progress: Progress
) -> Timing:
    """Run what is missing; return what it took.

    Raises:
        EvalError: if it had to stop; the message says how to go on.
    """
    started = time.monotonic()
    failed_in_a_row = 0

    def keep(sample: Sample) -> None:
        nonlocal failed_in_a_row
        with _writing(run):
            record.append(sample)
            write_sample_files(run, sample)
        progress.add(sample)
        failed_in_a_row = 0 if sample.error is None else failed_in_a_row + 1
        if failed_in_a_row == MAX_FAILED_IN_A_ROW:
            raise EvalError(f"the last {failed_in_a_row} problems failed, the last one with: {sample.error}")

    try:
        evaluate(missing, plan, parallel, keep)
    except KeyboardInterrupt:
        raise InterruptedRunError(f"stopped. {_how_to_go_on(run)}") from None
    except EvalError as error:
        raise EvalError(f"{error}. {_how_to_go_on(run)}") from error
    return Timing(time.monotonic() - started, frozenset(problem.problem_id for problem in missing))


@contextmanager
def _writing(run: Run) -> Iterator[None]:
    """Turn a full or read-only disk into one clear line."""
    try:
        yield
    except OSError as error:
        raise EvalError(f"{error.filename or run.path} cannot be written: {error.strerror}") from error


def _how_to_go_on(run: Run) -> str:
    return f"Finished samples are kept in {run.path}; the same command (without --new) continues there."
