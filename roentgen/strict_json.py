"""Parses JSON from other programs strictly: rejects what is not JSON and what cannot be represented exactly.

Python's parser is lenient: it accepts NaN and Infinity, rounds `1e400` to infinity, keeps the last of two equal keys, and
accepts unpaired surrogates, which no tokenizer, parquet file or reply can encode. Each of these would fail late, in a
replica or in the store, or silently change a result. Request bodies and lines of files are parsed here, so that every field
is validated once, before a model sees it, and errors name the field.
"""

import json
from collections.abc import Iterator
from typing import Any

from roentgen.contract import is_text

MAX_DEPTH = 100
"""Maximum nesting of objects and lists. Templates, pickle and pydantic recurse per level, and Python's limit is 1000 calls."""

MAX_FIELD = 200
"""Maximum characters of a field's name in an error; the client chose the name."""

_Path = tuple[Any, ...]
"""Path of a value: `(parent's path, key)`, or `()` for the body. It is converted to a string only for an error."""


class JsonError(ValueError):
    """A text is not valid JSON.

    Attributes:
        field: the field at fault, such as `messages.0.content`; None for the whole text.
        reason: what is wrong with it.
        no_text: True if it is a string that cannot be encoded.
    """

    def __init__(self, field: str | None, reason: str, *, no_text: bool = False) -> None:
        super().__init__(f"{field}: {reason}" if field else reason)
        self.field = field
        self.reason = reason
        self.no_text = no_text


class _Repeated(dict[str, Any]):
    """An object with a duplicate key; `key` is the first such key."""

    key: str


class _Long(int):
    """A number with more digits than Python parses."""


def read_json(body: bytes) -> Any:
    """Parse and validate a text.

    Raises:
        JsonError: if the text is invalid; the error names the field, if one is at fault.
    """
    encoding = json.detect_encoding(body)  # UTF-8, except from programs that do not follow RFC 8259
    try:
        text = body.decode(encoding)
    except UnicodeDecodeError as error:
        raise JsonError(None, f"not {encoding.upper()}: {error.reason} at byte {error.start}", no_text=True) from error
    try:
        value = _loads(text)
    except json.JSONDecodeError as error:
        raise JsonError(None, f"not JSON: {error.msg} at position {error.pos}") from error
    except RecursionError as error:
        raise JsonError(None, f"nested more than {MAX_DEPTH} deep") from error
    _check(value)
    return value


def _loads(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError:
        raise
    except ValueError:  # a number is too long; parse again to locate it
        return json.loads(text, object_pairs_hook=_object, parse_int=lambda _: _Long())


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    seen: set[str] = set()
    repeated = _Repeated(made)
    repeated.key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    return repeated


def _check(body: Any) -> None:
    """Validate every value, without recursion, so that the depth is not limited by it."""
    open_values: list[tuple[_Path, int, Any]] = [((), 0, body)]
    while open_values:
        path, depth, value = open_values.pop()
        match value:
            case dict() | list():
                if depth == MAX_DEPTH:
                    while path[0]:  # only the outermost key is useful
                        path = path[0]
                    raise _refused(path, f"nested more than {MAX_DEPTH} deep")
                open_values += ((where, depth + 1, inner) for where, inner in _inside(path, value))
            case str():
                if not is_text(value):
                    raise _refused(path, "an unpaired surrogate cannot be encoded", no_text=True)
            case float():
                if not float("-inf") < value < float("inf"):
                    raise _refused(
                        path, f"{_NAMES[str(value)]} is not a number that JSON has, or too large for a float"
                    )
            case _Long():
                raise _refused(path, "a number with more than 4300 digits")


_NAMES = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


def _inside(path: _Path, value: dict[str, Any] | list[Any]) -> Iterator[tuple[_Path, Any]]:
    if isinstance(value, list):
        # Most numbers of a body are in long lists of token ids, which need no validation.
        yield from (((path, i), inner) for i, inner in enumerate(value) if type(inner) is not int)
        return
    if isinstance(value, _Repeated):
        raise _refused((path, value.key), "duplicate key")
    for key, inner in value.items():
        if not is_text(key):
            raise _refused(
                path, f"its key {key[:100]!r} contains an unpaired surrogate, which cannot be encoded", no_text=True
            )
        yield (path, key), inner


def _refused(path: _Path, reason: str, *, no_text: bool = False) -> JsonError:
    parts: list[str] = []
    while path:
        path, key = path
        parts.append(str(key))
    return JsonError(".".join(reversed(parts))[:MAX_FIELD] or None, reason, no_text=no_text)
