"""The consoles that all commands print to, and how they report errors.

An expected error prints one line to stderr and exits with code 2. Any other error is a bug and shows its traceback.
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
"""The first stage of commands that import torch."""


@contextmanager
def expected_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Report expected errors, those of this package and `kinds`, as one line, and exit with code 2."""
    expected: tuple[type[Exception], ...] = (RoentgenError, *kinds)
    try:
        yield
    except expected as error:
        message = getattr(error, "for_console", None) or error
        err.print(f"error: {message}", style="red", highlight=False, markup=False)
        raise typer.Exit(2) from error


def table_of(*columns: str, **options: Any) -> Table:
    """Return a table that wraps long names instead of cutting them."""
    return Table(*(Column(column, overflow="fold") for column in columns), **options)


def stages() -> Stages:
    """Return a progress display on stderr; use it as a context manager."""
    return Stages(err)
