"""Says to a script what its own arguments are called.

What checks an evaluation, a server or a run is shared with the commands, and names their options: `--max-tokens`. A script has
given `max_tokens`. Commands that a message shows in back-ticks are left as they are.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from roentgen.errors import RoentgenError

_OPTION = re.compile(r"(`[^`]*`|'roentgen [^']*')|(?<![\w-])--(?:no-)?([a-z][a-z0-9]*(?:-[a-z0-9]+)*)")


def in_python(message: str, **called: str) -> str:
    """Return a message with options spelled as arguments; `called` names those that are called otherwise than the option."""

    def spelled(found: re.Match[str]) -> str:
        if found[1]:
            return found[1]
        name = found[2].replace("-", "_")
        return called.get(name, name)

    return _OPTION.sub(spelled, message)


@contextmanager
def naming_arguments(**called: str) -> Iterator[None]:
    """Spell the errors of this package that leave a block, or a decorated function, as a script does (see `in_python`)."""
    try:
        yield
    except RoentgenError as error:
        if error.args and isinstance(error.args[0], str):
            error.for_console = error.for_console or str(error)
            error.args = (in_python(error.args[0], **called), *error.args[1:])
        raise
