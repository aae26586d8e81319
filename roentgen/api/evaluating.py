"""An evaluation from a script: what `roentgen eval` does, with the same settings, files and resumption."""

import asyncio
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from rich.console import Console

from eval_jobs import EvalError
from eval_jobs.command import perform
from eval_jobs.problems import ProblemError
from eval_jobs.resume import RESULTS
from eval_jobs.settings import EvalSettings, check_settings
from roentgen.api.asking import capture_fields
from roentgen.api.model import Model
from roentgen.api.serving import Server, serve
from roentgen.contract import canonical_hash
from roentgen.durable import make_folder, write_text
from roentgen.runs import Run
from roentgen.serving.for_evaluation import serving_for
from roentgen.serving.local_server import LaunchError
from roentgen.stages import Stages
from roentgen.store import StoreError


def evaluate(
    problems: str | Path | Iterable[Mapping[str, Any]] = "arithmetic",
    *,
    model: str | Server | Model | None = None,
    capture: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    console: Console | None = None,
    **settings: Any,
) -> Run:
    """Evaluate a model on problems and score its answers; call it again with the same arguments to continue.

    Args:
        problems: arithmetic, gsm8k, gsm8k-train, gsm-symbolic, a .jsonl file in GSM8K's format, or a list of
            `{"question": …, "answer": …}`, all of which are posed. An answer is a number, or a solution that ends with
            "#### <number>". A list is kept as a file, in the output folder or under results/problems.
        model: a model's name, which is served for as long as it takes; a loaded `Model`, which is served from this process as
            it is, so its weights are in memory once; a `Server`; the base URL of any OpenAI-compatible server.
        capture: what to keep of activations, such as `dict(layers="all", hook_points=["resid_post"])`; nothing if absent.
        output: the run directory; made up under results/ if absent.
        console: where progress is shown; standard error if absent.
        settings: the other options of `roentgen eval`, as Python spells them: samples, epochs, prompt, temperature, seed,
            max_tokens, parallel, extractor (docs/evaluation.md).

    Returns:
        The run, complete or with failed samples.

    Raises:
        EvalError: if an option is not allowed, or the problems, the server or the run directory cannot be used.
        RunError: if the run directory is damaged.
        RequestError: if something to keep is not known.
    """
    return _evaluate(problems, model, capture, output, console, settings)


async def evaluate_async(
    problems: str | Path | Iterable[Mapping[str, Any]] = "arithmetic",
    *,
    model: str | Server | Model | None = None,
    capture: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    console: Console | None = None,
    **settings: Any,
) -> Run:
    """Evaluate as `evaluate` does, while the event loop goes on.

    Cancelled, it stops what it has started; what is recorded stays, and the same call continues.
    """
    stop = Event()
    work = asyncio.ensure_future(
        asyncio.to_thread(_evaluate, problems, model, capture, output, console, settings, stop)
    )
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        stop.set()
        with suppress(EvalError):  # that it was stopped
            await work
        raise


def _evaluate(
    problems: str | Path | Iterable[Mapping[str, Any]],
    model: str | Server | Model | None,
    capture: Mapping[str, Any] | None,
    output: str | Path | None,
    console: Console | None,
    settings: Mapping[str, Any],
    stop: Event | None = None,
) -> Run:
    given: dict[str, Any] = {**settings, **_server(model), "output": output}
    if capture is not None:
        fields = capture_fields(capture)
        if "dtype" in fields:  # an evaluation's `dtype` is the model's
            fields["store_dtype"] = fields.pop("dtype")
        given |= {**fields, "collect_activations": True}
        if isinstance(fields.get("layers"), list):
            given["layers"] = tuple(fields["layers"])
    if isinstance(problems, str | Path):
        given["problems"] = str(problems)
    else:
        file, count = _write_problems(problems, None if output is None else Path(output))
        given["problems"] = str(file)
        given.setdefault("samples", count)
    shown = console or Console(stderr=True)
    asked = check_settings(**{name: value for name, value in given.items() if value is not None})
    loaded = model if isinstance(model, Model) else None
    run = perform(asked, partial(_serving, console=shown, loaded=loaded), shown, stop)
    if run is None:
        raise ProblemError("dry_run: a description is no run; use `roentgen eval --dry-run`")
    return run


def _server(model: str | Server | Model | None) -> dict[str, Any]:
    """Return the settings that say what is evaluated, and where."""
    if isinstance(model, Server):
        return {"base_url": model.base_url}
    if isinstance(model, Model):
        config = model.config
        return {"model": config.model, "revision": config.revision, "dtype": model.dtype, "device": config.device}
    if model is not None and model.startswith(("http://", "https://")):
        return {"base_url": model}
    return {} if model is None else {"model": model}


@contextmanager
def _serving(settings: EvalSettings, console: Console, loaded: Model | None) -> Iterator[str]:
    """Serve a loaded model from here, and any other as the command does."""
    if loaded is None:
        with serving_for(settings, Stages(console)) as base_url:
            yield base_url
        return
    store: dict[str, Any] = {} if settings.store is None else {"store": settings.store}
    try:
        with serve(loaded, capture=settings.collect_activations, **store) as server:
            yield server.base_url
    except (LaunchError, StoreError) as error:
        raise EvalError(str(error)) from error


def _write_problems(problems: Iterable[Mapping[str, Any]], output: Path | None) -> tuple[Path, int]:
    """Keep problems in a file of GSM8K's format; returns it and how many there are.

    Raises:
        ProblemError: naming the first that is none.
    """
    lines = []
    for number, problem in enumerate(problems, start=1):
        fields = dict(problem)
        if not isinstance(fields.get("question"), str) or "answer" not in fields:
            raise ProblemError(f"problems[{number - 1}]: a problem has a 'question', a text, and an 'answer'")
        answer = str(fields["answer"])
        lines.append({**fields, "answer": answer if "####" in answer else f"#### {answer}"})
    if not lines:
        raise ProblemError("problems: the list is empty")
    folder = RESULTS / "problems" if output is None else output.expanduser()
    name = "problems.jsonl" if output is not None else f"problems-{canonical_hash(lines)}.jsonl"
    make_folder(folder)
    path = folder.absolute() / name
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return path, len(lines)
