"""What all verbs print with, and how they say what went wrong.

Expected errors end as one line on stderr and exit code 2; anything else is a bug and shows its traceback.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

out = Console()
err = Console(stderr=True, soft_wrap=True)


@contextmanager
def expected_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turn the errors a user can cause into one line and exit code 2."""
    try:
        yield
    except kinds as error:
        err.print(f"error: {describe(error)}", style="red", highlight=False, markup=False)
        raise typer.Exit(2) from error


def stage_printer() -> Callable[[str], None]:
    """Return a function that prints what is being done, with the seconds since the start."""
    start = time.monotonic()
    return lambda text: err.print(f"[dim]{time.monotonic() - start:6.1f} s[/dim] {text}", highlight=False)


def describe(error: Exception) -> str:
    """Say an error in one line; of a validation error, each option, what was given and what is allowed."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(
        f"--{str(e['loc'][0]).replace('_', '-')}: {e['msg']} (given: {e['input']!r})" for e in error.errors()
    )
