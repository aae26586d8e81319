"""The command line of an evaluation: `python -m eval_jobs …`, and the same command as `roentgen eval …`.

The two differ in one thing. `roentgen eval` puts a `ServerFactory` into the context, so that without `--base-url` it starts
a server of its own. `python -m eval_jobs` runs beside a server that is there already (in a Ray job, for example) and takes
its address from `$ROENTGEN_BASE_URL`. Problems and settings are checked before any server is started.

Imports of Ray and the OpenAI SDK wait until they are needed, so that `--help` answers at once.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from eval_jobs import EvalError
from eval_jobs.problems import SOURCES
from eval_jobs.prompts import PROMPTS
from eval_jobs.scoring import EXTRACTORS
from eval_jobs.selection import load_problems
from eval_jobs.settings import EMBEDDED_MODEL, SERVER_OPTIONS, EvalSettings, SettingsError, check_settings
from roentgen.cluster import ClusterError
from roentgen.contract import DEFAULT_HOOK_POINTS, DEFAULT_LAYERS
from roentgen.runs import RunError

BASE_URL_VARIABLE = "ROENTGEN_BASE_URL"
DEFAULT_BASE_URL = "http://127.0.0.1:8000/v1"

ServerFactory = Callable[[EvalSettings], AbstractContextManager[str]]
"""Starts a server for the settings and gives its base URL, http://127.0.0.1:PORT/v1; leaving the context stops it. It may
leave Ray connected while it is open; the evaluation then uses that connection."""

_DEFAULTS = EvalSettings()


def evaluate(
    ctx: typer.Context,
    problems: Annotated[
        str, typer.Option(help=f"{', '.join(SOURCES)}, or a .jsonl file in GSM8K's format.")
    ] = _DEFAULTS.problems,
    samples: Annotated[int, typer.Option(help="How many problems.")] = _DEFAULTS.samples,
    offset: Annotated[int, typer.Option(help="How many problems to leave out before them.")] = _DEFAULTS.offset,
    sample_ids: Annotated[str | None, typer.Option(help="Exactly these problems: 3,17 or gsm8k-test-0017.")] = None,
    shuffle: Annotated[bool, typer.Option("--shuffle", help="Take problems in an order drawn from --seed.")] = False,
    epochs: Annotated[int, typer.Option(help="Samples per problem.")] = _DEFAULTS.epochs,
    mode: Annotated[str, typer.Option(help="no-tools, or with-tools for a calculator.")] = _DEFAULTS.mode,
    max_turns: Annotated[int, typer.Option(help="Requests per sample, at most, with tools.")] = _DEFAULTS.max_turns,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate per problem.")] = _DEFAULTS.max_tokens,
    parallel: Annotated[
        str, typer.Option(help="Requests in flight, or auto for as many as make the server faster.")
    ] = str(_DEFAULTS.parallel),
    model: Annotated[
        str | None, typer.Option(help=f"The model; {EMBEDDED_MODEL} on a server started here, else the server's own.")
    ] = None,
    layers: Annotated[str, typer.Option(help="Layers to keep, or all.")] = ",".join(map(str, DEFAULT_LAYERS)),
    hook_points: Annotated[str, typer.Option(help="Hook points to keep.")] = ",".join(DEFAULT_HOOK_POINTS),
    positions: Annotated[
        str,
        typer.Option(
            help="Positions to keep: all, prompt, generated, last_prompt, last, stride:k, mean_prompt, mean_generated."
        ),
    ] = _DEFAULTS.positions,
    collect_activations: Annotated[bool, typer.Option("--collect-activations", help="Keep activations.")] = False,
    allow_non_finite: Annotated[
        bool,
        typer.Option("--allow-non-finite", help="Keep rows with NaN or infinity; they fail their sample otherwise."),
    ] = False,
    output: Annotated[Path | None, typer.Option(help="The run directory; made up under results/ if absent.")] = None,
    base_url: Annotated[str | None, typer.Option(help="An OpenAI-compatible server, http://HOST:PORT/v1.")] = None,
    ray_address: Annotated[str | None, typer.Option(help="The Ray cluster: local or HOST:PORT.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = _DEFAULTS.temperature,
    top_p: Annotated[float, typer.Option(help="Nucleus of the sampling.")] = _DEFAULTS.top_p,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = _DEFAULTS.seed,
    prompt: Annotated[str, typer.Option(help=f"{', '.join(PROMPTS)}.")] = _DEFAULTS.prompt,
    prompt_file: Annotated[Path | None, typer.Option(help="A text with {question} in it, instead.")] = None,
    system: Annotated[str | None, typer.Option(help="The system's message.")] = None,
    variants: Annotated[
        Path | None, typer.Option(help="A YAML file of names and prompt prefixes: all problems under each.")
    ] = None,
    extractor: Annotated[
        str | None,
        typer.Option(help=f"The primary one of {', '.join(EXTRACTORS)}; the prompt's own if absent. All are reported."),
    ] = None,
    request_timeout: Annotated[
        float, typer.Option(help="Seconds one request may take, retries included.")
    ] = _DEFAULTS.request_timeout,
    fail_on_error: Annotated[int | None, typer.Option(help="Stop after so many failed samples.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be run and how much would be stored, and stop.")
    ] = False,
    new: Annotated[bool, typer.Option("--new", help="Start another run instead of continuing one.")] = False,
    store: Annotated[str | None, typer.Option(help="Where a server started here keeps activations.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Precision of a model loaded here.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a model loaded here.")] = None,
    device: Annotated[str | None, typer.Option(help="Device of a model loaded here.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show Ray's log, and tracebacks.")] = False,
) -> None:
    """Evaluate a model on problems, and keep its activations if asked. Run it again to continue where it stopped.

    Ends with 0 if every problem has an answer, 1 if some samples failed, 2 if it could not run, 130 on Ctrl-C.
    """
    options = {name: value for name, value in locals().items() if name != "ctx"}
    progress = Console(stderr=True)
    try:
        settings = check_settings(**options)
        failed = _run(settings, ctx.obj if callable(ctx.obj) else None, progress)
    except (ClusterError, EvalError, RunError) as error:
        if verbose:
            progress.print_exception()
        progress.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(getattr(error, "exit_code", EvalError.exit_code)) from error
    except KeyboardInterrupt:
        progress.print("stopped.", style="red")
        raise typer.Exit(130) from None
    raise typer.Exit(1 if failed else 0)


def _run(settings: EvalSettings, factory: ServerFactory | None, progress: Console) -> int:
    """Run an evaluation and print its summary; return the number of failed samples."""
    problems = load_problems(settings.selection)
    if factory is not None and settings.base_url is None:
        settings = settings.model_copy(update={"model": settings.model or EMBEDDED_MODEL})
        server = factory(settings)
    else:
        server = nullcontext(_address(settings))

    from eval_jobs.console import print_summary
    from eval_jobs.driver import describe, run_evaluation

    with server as base_url:
        if settings.dry_run:
            describe(settings, problems, base_url, Console())
            return 0
        run = run_evaluation(settings, problems, base_url, progress)
    summary = run.summary() or {}
    print_summary(run, summary, Console())
    return int(summary["errors"])


def _address(settings: EvalSettings) -> str:
    """Return where the server is that was started elsewhere.

    Raises:
        SettingsError: if options were given that only a server started here could honour.
    """
    base_url = settings.base_url or os.environ.get(BASE_URL_VARIABLE, DEFAULT_BASE_URL)
    given = [f"--{name}" for name in SERVER_OPTIONS if getattr(settings, name) is not None]
    if given:
        raise SettingsError(f"{', '.join(given)}: only for a server started here; the one at {base_url} has its own")
    return base_url
