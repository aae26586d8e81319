"""The command line of an evaluation: `python -m eval_jobs …`, and the same command as `roentgen eval …`.

They differ in one point. `roentgen eval` puts a `ServerFactory` into the context, so that it starts its own server if
`--base-url` is absent. `python -m eval_jobs` runs beside an existing server, for example in a Ray job, and takes its
address from `$ROENTGEN_BASE_URL`. Problems and settings are validated before a server is started.

Imports of Ray and the OpenAI SDK are deferred, so that `--help` answers at once.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from threading import Event
from typing import Any

import typer
from rich.console import Console

from eval_jobs import EvalError
from eval_jobs.prompts import check_prompt
from eval_jobs.resume import check_output
from eval_jobs.selection import load_problems
from eval_jobs.settings import CAPTURE_OPTIONS, SERVER_OPTIONS, EvalSettings, SettingsError, check_settings
from roentgen.defaults import EMBEDDED_MODEL, base_url
from roentgen.errors import RoentgenError
from roentgen.options import options_of
from roentgen.runs import Run

BASE_URL_VARIABLE = "ROENTGEN_BASE_URL"

ServerFactory = Callable[[EvalSettings], AbstractContextManager[str]]
"""Starts a server for the settings and yields its base URL, http://127.0.0.1:PORT/v1; leaving the context stops the server.
It may leave Ray connected while it is open; the evaluation then uses that connection."""


@options_of(EvalSettings)
def evaluate(ctx: typer.Context, **options: Any) -> None:
    """Evaluate a model on problems and optionally store its activations. Run the command again to continue an interrupted run.

    The exit code is 0 if every problem has an answer, 1 if some samples failed, 2 if the evaluation could not run, and 130 on
    Ctrl-C.
    """
    progress = Console(stderr=True)
    try:
        settings = check_settings(**{**options, **_implied_options(ctx, options, progress)})
        failed = _run(settings, ctx.obj if callable(ctx.obj) else None, progress)
    except RoentgenError as error:
        if options["verbose"]:
            progress.print_exception()
        progress.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(getattr(error, "exit_code", EvalError.exit_code)) from error
    except KeyboardInterrupt:
        progress.print("interrupted", style="red")
        raise typer.Exit(130) from None
    raise typer.Exit(1 if failed else 0)


def _implied_options(ctx: typer.Context, options: dict[str, Any], progress: Console) -> dict[str, Any]:
    """Return the settings that other options imply: options that choose activations imply --collect-activations."""
    given = [
        f"--{name.replace('_', '-')}"
        for name in CAPTURE_OPTIONS
        if (source := ctx.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    ]
    if options["collect_activations"] or not given:
        return {}
    progress.print(
        f"{', '.join(given)}: activations are stored (--collect-activations)", highlight=False, soft_wrap=True
    )
    return {"collect_activations": True}


def _run(settings: EvalSettings, factory: ServerFactory | None, progress: Console) -> int:
    """Run an evaluation and print its summary; return the number of failed samples."""
    run = perform(settings, factory, progress)
    if run is None:
        return 0
    from eval_jobs.terminal_summary import print_summary

    summary = run.summary() or {}
    print_summary(run, summary, Console())
    return int(summary["errors"])


def perform(
    settings: EvalSettings, factory: ServerFactory | None, progress: Console, stop: Event | None = None
) -> Run | None:
    """Run an evaluation on the server that the settings name, or on a server started for it.

    Args:
        settings: the settings.
        factory: starts a server if the settings name none; None uses the server named in the environment.
        progress: the console that shows progress.
        stop: stops the evaluation when set; used instead of signals, which only the main thread receives.

    Returns:
        The run, complete or with failed samples; None for a dry run.

    Raises:
        EvalError: if the problems, the server, Ray or the run directory cannot be used, or on Ctrl-C or SIGTERM.
        RunError: if the run directory cannot be used.
    """
    problems = load_problems(settings.selection)
    check_prompt(settings.suited_to(problems).chosen_prompt, problems)
    own = factory is not None and settings.base_url is None
    if factory is not None and own:
        settings = settings.model_copy(update={"model": settings.model or EMBEDDED_MODEL})
        check_output(settings.suited_to(problems), problems)
        server = factory(settings)
    else:
        server = nullcontext(_address(settings))

    with server as base_url:
        # Imported after the checks above, so that their errors appear without delay.
        from eval_jobs.driver import describe, run_evaluation

        if settings.dry_run:
            describe(settings, problems, base_url, Console())
            return None
        return run_evaluation(settings, problems, base_url, progress, stop, is_own=own)


def _address(settings: EvalSettings) -> str:
    """Return the address of a server that was started elsewhere.

    Raises:
        SettingsError: if options were given that apply only to a server started by this command.
    """
    address = settings.base_url or os.environ.get(BASE_URL_VARIABLE, base_url())
    given = [f"--{name}" for name in SERVER_OPTIONS if getattr(settings, name) is not None]
    if given:
        raise SettingsError(
            f"{', '.join(given)}: allowed only if this command starts the server; the server at {address} has its own settings"
        )
    return address
