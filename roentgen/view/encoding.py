"""Answers as JSON."""

import json
from typing import Any


def encoded(answer: Any) -> bytes:
    """Return an answer as JSON; half a surrogate pair, which a model may write, has no encoding and becomes a question mark.

    Raises:
        ValueError: if a number in it is not finite, which JSON does not have.
    """
    return json.dumps(answer, ensure_ascii=False, allow_nan=False).encode(errors="replace")
