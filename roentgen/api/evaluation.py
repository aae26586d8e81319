"""`evaluate`: runs an evaluation from a script, with the settings, files and resumption of `roentgen eval`."""

import asyncio
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import pandas as pd
from rich.console import Console

from eval_jobs import EvalError, InterruptedRunError
from eval_jobs.command import perform
from eval_jobs.problems import ProblemError, ProblemSource, Record, read_records
from eval_jobs.prompts import Pose, Prompt
from eval_jobs.records import record_of
from eval_jobs.resume import RESULTS
from eval_jobs.settings import EvalSettings, check_settings
from eval_jobs.verdicts import Scorer
from roentgen.api.model import Model
from roentgen.api.request_building import capture_fields, named
from roentgen.api.server import Server, serve
from roentgen.argument_names import naming_arguments
from roentgen.atomic_files import make_folder, write_text
from roentgen.contract import canonical_hash
from roentgen.extensions import preview
from roentgen.runs import Run
from roentgen.serving.for_evaluation import serving_for
from roentgen.serving.local_server import LaunchError
from roentgen.stages import Stages
from roentgen.store import StoreError

TURN_S = 0.2
"""Seconds between runs of the event loop during an evaluation; a notebook's interrupt is delivered then."""


def evaluate(
    problems: str | Path | ProblemSource | Iterable[Record] = "arithmetic",
    *,
    prompt: str | Prompt | Pose | None = None,
    scorer: str | Scorer | None = None,
    model: str | Path | Server | Model | None = None,
    capture: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    console: Console | None = None,
    **settings: Any,
) -> Run:
    """Evaluate a model on problems and score its answers. Call it again with the same arguments to continue.

    Args:
        problems: arithmetic, gsm8k, gsm8k-train, gsm-symbolic, a file, a dataset `hf:OWNER/NAME?split=test`, a function that
            returns records (docs/extending.md), or the records themselves: a list, a pandas or `datasets` table, or any
            iterable of `{"question": …, "answer": …}`, all of which are used. An answer is a number, a text, or a solution
            that ends with "#### <answer>". Records are saved to a file in the output folder or results/problems.
        prompt: the prompt format: a name such as answer-line or gsm8k, a text with {question} in it, a Jinja template, a
            `Prompt`, or a function of a `Problem` that returns a text or messages.
        scorer: the scorer of the answers: a name such as answer or flexible, or a function `(output, problem)`, which may be a
            coroutine function, that returns a `Verdict`, True or False. The function and what it uses are sent to the
            processes that run it.
        model: a model's name, which is served during the evaluation; a loaded `Model`, which is served from this process as
            it is, with one copy of its weights; a `Server`; or the base URL of any OpenAI-compatible server.
        capture: activations to capture, such as `dict(layers="all", hook_points=["resid_post"])`; None for none.
        output: the run directory; None for a new one under results/.
        console: where to show progress; None for standard error.
        settings: other options of `roentgen eval`, with underscores: samples, epochs, temperature, seed, max_tokens,
            parallel, columns, fields (docs/evaluation.md).

    Returns:
        The run, complete or with failed samples.

    Raises:
        EvalError: if an option is not allowed, or the problems, the server or the run directory cannot be used.
        RunError: if the run directory is damaged.
        RequestError: if a field of `capture` is unknown.
        KeyboardInterrupt: on Ctrl-C and SIGTERM; the message says where the finished samples are.
    """
    own = {**settings, "prompt": prompt, "scorer": scorer}
    try:
        return _evaluate(problems, model, capture, output, console, own)
    except InterruptedRunError as error:  # code that handles errors must not handle Ctrl-C
        raise KeyboardInterrupt(str(error)) from None


async def evaluate_async(
    problems: str | Path | ProblemSource | Iterable[Record] = "arithmetic",
    *,
    prompt: str | Prompt | Pose | None = None,
    scorer: str | Scorer | None = None,
    model: str | Path | Server | Model | None = None,
    capture: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    console: Console | None = None,
    **settings: Any,
) -> Run:
    """Evaluate as `evaluate` does, without blocking the event loop.

    When it is cancelled, it stops what it has started and says where the finished samples are; the same call continues.
    """
    own = {**settings, "prompt": prompt, "scorer": scorer}
    stop = Event()
    work = asyncio.ensure_future(asyncio.to_thread(_evaluate, problems, model, capture, output, console, own, stop))
    try:
        while not work.done():  # a notebook's loop handles an interrupt only when it runs
            await asyncio.wait({work}, timeout=TURN_S)
        return work.result()
    except asyncio.CancelledError:
        stop.set()
        try:
            await work
        except EvalError as error:  # it was stopped
            raise asyncio.CancelledError(str(error)) from None
        raise


@naming_arguments(extractor="scorer", collect_activations="capture")
def _evaluate(
    problems: str | Path | ProblemSource | Iterable[Record],
    model: str | Path | Server | Model | None,
    capture: Mapping[str, Any] | None,
    output: str | Path | None,
    console: Console | None,
    settings: Mapping[str, Any],
    stop: Event | None = None,
) -> Run:
    if settings.get("scorer") is not None and settings.get("extractor") is not None:
        raise ProblemError("scorer: extractor is another name for it; give only one of them")
    given: dict[str, Any] = {**settings, **_server(model), "output": output}
    given["extractor"] = given.pop("scorer", None) or given.get("extractor")
    if capture is not None:
        fields = capture_fields(capture)
        if "dtype" in fields:  # `dtype` of an evaluation is the model's
            fields["store_dtype"] = fields.pop("dtype")
        given |= {**fields, "collect_activations": True}
        if isinstance(fields.get("layers"), list):
            given["layers"] = tuple(fields["layers"])
    if isinstance(problems, str | Path):
        given["problems"] = str(problems)
    elif callable(problems):
        given["problems"] = problems
    else:
        columns = given.pop("columns", None), given.pop("fields", None)
        file, count = _write_problems(problems, None if output is None else Path(output), *columns)
        given["problems"] = str(file)
        given.setdefault("samples", count)
    shown = console or Console(stderr=True)
    asked = check_settings(**{name: value for name, value in given.items() if value is not None})
    loaded = model if isinstance(model, Model) else None
    run = perform(asked, partial(_serving, console=shown, loaded=loaded), shown, stop)
    if run is None:
        raise ProblemError("dry_run: not supported here, because it makes no run; use `roentgen eval --dry-run`")
    return run


def _server(model: str | Path | Server | Model | None) -> dict[str, Any]:
    """Return the settings of the model and the server."""
    if isinstance(model, Server):
        return {"base_url": model.base_url}
    if isinstance(model, Model):
        config = model.config
        own = {"model": config.model, "revision": config.revision, "dtype": model.dtype, "device": config.device}
        return own | {"quantize": config.quantize}
    model = named(model)
    if model is not None and not isinstance(model, str):
        raise ProblemError(
            f"model: {preview(model)} is not a model; allowed are a name, a base URL, a loaded Model, and a running Server "
            "(`with roentgen.serve(…) as server`)"
        )
    if model is not None and model.startswith(("http://", "https://")):
        return {"base_url": model}
    return {} if model is None else {"model": model}


@contextmanager
def _serving(settings: EvalSettings, console: Console, loaded: Model | None) -> Iterator[str]:
    """Serve a loaded model from this process, and any other model as `roentgen eval` does."""
    if loaded is None:
        with Stages(console) as stage, serving_for(settings, stage) as base_url:
            stage.rest()
            yield base_url
        return
    store: dict[str, Any] = {} if settings.store is None else {"store": settings.store}
    try:
        with serve(loaded, capture=settings.collect_activations, **store) as server:
            yield server.base_url
    except (LaunchError, StoreError) as error:
        raise EvalError(str(error)) from error


def _write_problems(
    problems: Iterable[Record], output: Path | None, columns: Mapping[str, str] | None, fields: Sequence[str] | None
) -> tuple[Path, int]:
    """Write problems to a file; return its path and the number of problems.

    Raises:
        ProblemError: if a record is not a problem; the message names the first one.
    """
    rows: Iterable[Any] = problems.to_dict("records") if isinstance(problems, pd.DataFrame) else problems
    lines = [record_of(problem) for problem in read_records(rows, columns, fields)]
    if not lines:
        raise ProblemError("problems: the list is empty")
    folder = RESULTS / "problems" if output is None else output.expanduser()
    name = "problems.jsonl" if output is not None else f"problems-{canonical_hash(lines)}.jsonl"
    make_folder(folder)
    path = folder.absolute() / name
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return path, len(lines)
