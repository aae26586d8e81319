"""Hashes a function: its source, and everything else that determines its behavior.

A run records which function judged it. A name is not enough, because the function may have been edited. The hash covers the
function's source; the functions, classes and constants of the same folder that it uses by name, recursively; its closure; and
the values of a partial or an object. Libraries are hashed only by name.
"""

import hashlib
import inspect
import re
import textwrap
import types
from collections.abc import Iterator
from dataclasses import is_dataclass
from functools import partial
from pathlib import PurePath
from typing import Any

from roentgen.contract import canonical_hash
from roentgen.extensions.pickling import is_users


def fingerprint(value: Any) -> str:
    """Return 16 hexadecimal digits that change when a function, a class, an object or a text is edited."""
    return canonical_hash(_content(value, {}))


def _content(value: Any, seen: dict[int, Any]) -> Any:
    """Return a JSON value that differs for values with different behavior."""
    if value is None or isinstance(value, bool | int | float | str):
        return [type(value).__name__, str(value)]
    if isinstance(value, bytes | complex | PurePath):
        return [type(value).__name__, repr(value)]
    if isinstance(value, re.Pattern):
        return ["pattern", str(value.pattern), int(value.flags)]
    if isinstance(value, types.ModuleType):
        return ["module", value.__name__]
    if id(value) in seen:
        return "again"
    seen[id(value)] = value  # keep a reference, so that no later object gets its id
    if isinstance(value, list | tuple):
        return [type(value).__name__, [_content(one, seen) for one in value]]
    if isinstance(value, set | frozenset):
        return [type(value).__name__, sorted(str(_content(one, seen)) for one in value)]
    if isinstance(value, dict):
        return ["dict", [[_content(key, seen), _content(one, seen)] for key, one in value.items()]]
    if isinstance(value, partial):
        return ["partial", *(_content(part, seen) for part in (value.func, value.args, value.keywords))]
    if isinstance(value, types.MethodType):
        return ["method", _content(value.__func__, seen), _content(value.__self__, seen)]
    return _object_content(value, seen)


def _object_content(value: Any, seen: dict[int, Any]) -> Any:
    if isinstance(value, types.FunctionType):
        value = inspect.unwrap(value)
        name = f"{value.__module__}.{value.__qualname__}"
        return ["function", *(_function_content(value, seen) if is_users(value) else [name])]
    if isinstance(value, type):
        return ["class", _source(value) if is_users(value) else f"{value.__module__}.{value.__qualname__}"]
    if hasattr(value, "tobytes"):  # an array
        return [type(value).__name__, hashlib.sha256(value.tobytes()).hexdigest()]
    own = getattr(value, "__dict__", {}) if is_dataclass(value) or is_users(type(value)) else {}
    return ["object", _content(type(value), seen), _content(dict(own), seen)]


def _function_content(function: types.FunctionType, seen: dict[int, Any]) -> Iterator[Any]:
    yield _source(function)
    yield [_content(part, seen) for part in (function.__defaults__, function.__kwdefaults__)]
    yield [_content(cell.cell_contents, seen) for cell in function.__closure__ or () if not _is_empty(cell)]
    known = function.__globals__
    for name in sorted({name for code in _codes(function.__code__) for name in code.co_names}):
        if name in known:
            yield [name, _content(known[name], seen)]


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield the code of a function and of its inner functions."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _is_empty(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is None
    except ValueError:  # the cell is not bound yet
        return True


def _source(value: Any) -> str:
    """Return the source, or the compiled code if there is no file."""
    try:
        return textwrap.dedent(inspect.getsource(value))
    except (OSError, TypeError):
        code = getattr(value, "__code__", None)
        return repr(value) if code is None else " ".join(f"{one.co_code.hex()} {one.co_names}" for one in _codes(code))
