"""What all verbs print with, and how they say what went wrong.

Expected errors end as one line on stderr and exit code 2; anything else is a bug and shows its traceback.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from roentgen.options import OptionError

out = Console()
err = Console(stderr=True, soft_wrap=True)


@contextmanager
def expected_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turn the errors a user can cause into one line and exit code 2."""
    expected: tuple[type[Exception], ...] = (OptionError, *kinds)
    try:
        yield
    except expected as error:
        err.print(f"error: {error}", style="red", highlight=False, markup=False)
        raise typer.Exit(2) from error


def stage_printer() -> Callable[[str], None]:
    """Return a function that prints what is being done, with the seconds since the start."""
    start = time.monotonic()
    return lambda text: err.print(f"[dim]{time.monotonic() - start:6.1f} s[/dim] {text}", highlight=False)
