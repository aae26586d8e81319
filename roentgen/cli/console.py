"""What all verbs print with, and how they say what went wrong.

Expected errors end as one line on stderr and exit code 2; anything else is a bug and shows its traceback.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.table import Column, Table

from roentgen.errors import RoentgenError
from roentgen.stages import Stages

out = Console()
err = Console(stderr=True, soft_wrap=True)

LOADING = "loading libraries"
"""The first stage of what needs torch."""


@contextmanager
def expected_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turn the errors a user can cause, those of this package and `kinds`, into one line and exit code 2."""
    expected: tuple[type[Exception], ...] = (RoentgenError, *kinds)
    try:
        yield
    except expected as error:
        said = getattr(error, "for_console", None) or error
        err.print(f"error: {said}", style="red", highlight=False, markup=False)
        raise typer.Exit(2) from error


def table_of(*columns: str, **options: Any) -> Table:
    """Return a table that shows every name whole: what does not fit goes on in the next line, and is not cut."""
    return Table(*(Column(column, overflow="fold") for column in columns), **options)


def stages() -> Stages:
    """Return what says on stderr what is being done; use it as a context."""
    return Stages(err)
