"""How a message speaks of what a user's function did: what it returned, and where it failed."""

import traceback
from pathlib import Path
from typing import Any

LONGEST = 200
"""Characters of a value that are shown."""


def preview(value: Any) -> str:
    """Return a value and its type, shortened: `'yes' (str)`."""
    text = repr(value)
    return f"{text if len(text) <= LONGEST else text[:LONGEST] + '…'} ({type(value).__name__})"


def format_error(error: BaseException) -> str:
    """Return an exception with the line that it comes from: the last one that is no library's."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        frame
        for frame in frames
        if "site-packages" not in frame.filename and _package not in Path(frame.filename).parents
    ]
    where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}{f': {error}' if str(error) else ''}{where}"


_package = Path(__file__).parents[2] / "eval_jobs"
"""Whoever called the user's function."""
