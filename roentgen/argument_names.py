"""Replaces option names in error messages by the arguments of the Python functions.

The checks of an evaluation, a server or a run are shared with the commands, and name options: `--max-tokens`. A script's
argument is `max_tokens`. Commands in back-ticks are not changed.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from roentgen.errors import RoentgenError

_OPTION = re.compile(r"(`[^`]*`|'roentgen [^']*')|(?<![\w-])--(?:no-)?([a-z][a-z0-9]*(?:-[a-z0-9]+)*)")


def in_python(message: str, **called: str) -> str:
    """Return a message with options replaced by arguments; `called` maps options to arguments with other names."""

    def as_argument(found: re.Match[str]) -> str:
        if found[1]:
            return found[1]
        name = found[2].replace("-", "_")
        return called.get(name, name)

    return _OPTION.sub(as_argument, message)


@contextmanager
def naming_arguments(**called: str) -> Iterator[None]:
    """Apply `in_python` to errors of this package that a block, or a decorated function, raises."""
    try:
        yield
    except RoentgenError as error:
        if error.args and isinstance(error.args[0], str):
            error.for_console = error.for_console or str(error)
            error.args = (in_python(error.args[0], **called), *error.args[1:])
        raise
