"""Reads JSON that others have written, and refuses what JSON does not have and what could not be held exactly.

Python's parser is lenient: it takes NaN and Infinity, rounds `1e400` to infinity, keeps the last of two equal keys, and lets
half a surrogate pair through, which no tokenizer, no parquet file and no reply can spell. Each of these would fail late, in a
replica or in the store, or change a result without a word. Bodies of requests and lines of files are read here, so that each
of their fields is checked once, before a model sees it, and an error names the field.
"""

import json
from collections.abc import Iterator
from typing import Any

from roentgen.contract import is_text

MAX_DEPTH = 100
"""Objects and lists inside one another. Templates, pickle and pydantic recurse for each, and Python's limit is 1000 calls."""

MAX_FIELD = 200
"""Characters of the name of a field at fault, which whoever wrote the text may have made up."""

_Path = tuple[Any, ...]
"""Where a value is: `(parent's path, key)`, or `()` for the body itself. Strings are made of it only for an error."""


class JsonError(ValueError):
    """A text is not JSON, or holds what JSON does not have.

    Attributes:
        field: what is at fault, `messages.0.content`; None for the whole.
        reason: what is wrong with it.
        no_text: whether it is a text that nothing can encode.
    """

    def __init__(self, field: str | None, reason: str, *, no_text: bool = False) -> None:
        super().__init__(f"{field}: {reason}" if field else reason)
        self.field = field
        self.reason = reason
        self.no_text = no_text


class _Repeated(dict[str, Any]):
    """An object whose text has a key twice; `key` is the first such."""

    key: str


class _Long(int):
    """A number of more digits than Python reads."""


def read_json(body: bytes) -> Any:
    """Parse and check a text.

    Raises:
        JsonError: naming the field where one is at fault.
    """
    encoding = json.detect_encoding(body)  # UTF-8 but for programs that do not know RFC 8259
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
    except ValueError:  # a number that is too long; it is read again only to find out where it is
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
    """Look at every value; without recursion, so that no depth is too deep for it."""
    open_values: list[tuple[_Path, int, Any]] = [((), 0, body)]
    while open_values:
        path, depth, value = open_values.pop()
        match value:
            case dict() | list():
                if depth == MAX_DEPTH:
                    while path[0]:  # the whole path is of no use
                        path = path[0]
                    raise _refused(path, f"nested more than {MAX_DEPTH} deep")
                open_values += ((where, depth + 1, inner) for where, inner in _inside(path, value))
            case str():
                if not is_text(value):
                    raise _refused(path, "half a surrogate pair is no text", no_text=True)
            case float():
                if not float("-inf") < value < float("inf"):
                    raise _refused(
                        path, f"{_NAMES[str(value)]} is not a number that JSON has, or too large for a float"
                    )
            case _Long():
                raise _refused(path, "a number of more digits than can be read (4300)")


_NAMES = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


def _inside(path: _Path, value: dict[str, Any] | list[Any]) -> Iterator[tuple[_Path, Any]]:
    if isinstance(value, list):
        # Most numbers of a body are in long lists of integers (tokens), which need no look.
        yield from (((path, i), inner) for i, inner in enumerate(value) if type(inner) is not int)
        return
    if isinstance(value, _Repeated):
        raise _refused((path, value.key), "the key is there twice")
    for key, inner in value.items():
        if not is_text(key):
            raise _refused(path, f"its key {key[:100]!r} has half a surrogate pair, which is no text", no_text=True)
        yield (path, key), inner


def _refused(path: _Path, reason: str, *, no_text: bool = False) -> JsonError:
    parts: list[str] = []
    while path:
        path, key = path
        parts.append(str(key))
    return JsonError(".".join(reversed(parts))[:MAX_FIELD] or None, reason, no_text=no_text)
