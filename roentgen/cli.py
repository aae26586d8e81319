"""The `roentgen` command: each verb calls one function of a room and prints what it returns.

Rooms are imported inside the verbs, so that `roentgen --help` does not wait for torch. Expected errors end as one line on
stderr and exit code 2; anything else is a bug and shows its traceback.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from eval_jobs.command import evaluate

if TYPE_CHECKING:
    from eval_jobs.config import EvalSettings

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__.split("\n")[0])
sessions_app = typer.Typer(no_args_is_help=True, help="Activation sessions of a store.")
probe_app = typer.Typer(no_args_is_help=True, help="Probes on stored activations.")
app.add_typer(sessions_app, name="sessions")
app.add_typer(probe_app, name="probe")

out = Console()
err = Console(stderr=True, soft_wrap=True)


@contextmanager
def expected_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turn the errors a user can cause into one line and exit code 2."""
    try:
        yield
    except kinds as error:
        err.print(f"[red]error:[/red] {error}", highlight=False)
        raise typer.Exit(2) from error


def stage_printer() -> Callable[[str], None]:
    """Return a function that prints what is being done, with the seconds since the start."""
    start = time.monotonic()
    return lambda text: err.print(f"[dim]{time.monotonic() - start:6.1f} s[/dim] {text}", highlight=False)
