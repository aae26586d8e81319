"""Formats what a user's function returned or raised, for error messages."""

import traceback
from pathlib import Path
from typing import Any

LONGEST = 200
"""Maximum number of characters of a value."""


def preview(value: Any) -> str:
    """Return a value, shortened, and its type: `'yes' (str)`."""
    text = repr(value)
    return f"{text if len(text) <= LONGEST else text[:LONGEST] + '…'} ({type(value).__name__})"


def format_error(error: BaseException) -> str:
    """Return an exception's text with the last line of user code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        frame
        for frame in frames
        if "site-packages" not in frame.filename and _package not in Path(frame.filename).parents
    ]
    where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}{f': {error}' if str(error) else ''}{where}"


_package = Path(__file__).parents[2] / "eval_jobs"
"""The package that calls users' functions."""
