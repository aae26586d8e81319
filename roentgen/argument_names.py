"""Says to a script what its own arguments are called.

What checks an evaluation, a server or a run is shared with the commands, and names their options: `--max-tokens`. A script has
given `max_tokens`. Commands that a message shows in back-ticks are left as they are.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

_OPTION = re.compile(r"(`[^`]*`|'roentgen [^']*')|(?<![\w-])--(?:no-)?([a-z][a-z0-9]*(?:-[a-z0-9]+)*)")
_OWN = frozenset(("eval_jobs", "probes", "roentgen", "serve_app"))


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
    except Exception as error:
        told = error.args[0] if error.args else None
        if isinstance(told, str) and type(error).__module__.partition(".")[0] in _OWN:
            error.args = (in_python(told, **called), *error.args[1:])
        raise
