"""A hash of a function: of its source, and of what else decides what it does.

A run records which function judged it. A name does not tell: the function behind it may have been edited. Hashed are the
function's source; the functions, classes and constants of the same folder that it uses by name, and theirs; what it closes
over; a partial's or an object's own values. Libraries are named and not followed.
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
    """Return 16 hexadecimal digits that change when what a function, a class, an object or a text does is edited."""
    return canonical_hash(_spell(value, {}))


def _spell(value: Any, seen: dict[int, Any]) -> Any:
    """Return a JSON value that differs wherever two values do something else."""
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
    seen[id(value)] = value  # kept, so that no later object has its number
    if isinstance(value, list | tuple):
        return [type(value).__name__, [_spell(one, seen) for one in value]]
    if isinstance(value, set | frozenset):
        return [type(value).__name__, sorted(str(_spell(one, seen)) for one in value)]
    if isinstance(value, dict):
        return ["dict", [[_spell(key, seen), _spell(one, seen)] for key, one in value.items()]]
    if isinstance(value, partial):
        return ["partial", *(_spell(part, seen) for part in (value.func, value.args, value.keywords))]
    if isinstance(value, types.MethodType):
        return ["method", _spell(value.__func__, seen), _spell(value.__self__, seen)]
    return _spell_object(value, seen)


def _spell_object(value: Any, seen: dict[int, Any]) -> Any:
    if isinstance(value, types.FunctionType):
        value = inspect.unwrap(value)
        name = f"{value.__module__}.{value.__qualname__}"
        return ["function", *(_spell_function(value, seen) if is_users(value) else [name])]
    if isinstance(value, type):
        return ["class", _source(value) if is_users(value) else f"{value.__module__}.{value.__qualname__}"]
    if hasattr(value, "tobytes"):  # an array
        return [type(value).__name__, hashlib.sha256(value.tobytes()).hexdigest()]
    own = getattr(value, "__dict__", {}) if is_dataclass(value) or is_users(type(value)) else {}
    return ["object", _spell(type(value), seen), _spell(dict(own), seen)]


def _spell_function(function: types.FunctionType, seen: dict[int, Any]) -> Iterator[Any]:
    yield _source(function)
    yield [_spell(part, seen) for part in (function.__defaults__, function.__kwdefaults__)]
    yield [_spell(cell.cell_contents, seen) for cell in function.__closure__ or () if not _is_empty(cell)]
    known = function.__globals__
    for name in sorted({name for code in _codes(function.__code__) for name in code.co_names}):
        if name in known:
            yield [name, _spell(known[name], seen)]


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield a function's code and that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _is_empty(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is None
    except ValueError:  # the name is not bound yet
        return True


def _source(value: Any) -> str:
    """Return the source, or what was compiled from it where there is no file."""
    try:
        return textwrap.dedent(inspect.getsource(value))
    except (OSError, TypeError):
        code = getattr(value, "__code__", None)
        return repr(value) if code is None else " ".join(f"{one.co_code.hex()} {one.co_names}" for one in _codes(code))
