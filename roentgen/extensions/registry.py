"""Finds an extension by its name or by a reference to it.

`module:function` is imported like `python -m`, with the working directory first on the path. `path/to/file.py:function` is
imported with the file's folder first, so that the file may import its neighbors. The part after the colon may be any
attribute, also with dots.
"""

import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from roentgen.errors import RoentgenError
from roentgen.extensions.fingerprint import fingerprint
from roentgen.extensions.pickling import is_users_module

T = TypeVar("T")

_ATTRIBUTE = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*"
_IN_FILE = re.compile(rf"(?P<file>.+\.py):(?P<attribute>{_ATTRIBUTE})")
_IN_MODULE = re.compile(rf"(?P<module>{_ATTRIBUTE}):(?P<attribute>{_ATTRIBUTE})")

HOW_TO_REFER = "a reference, module:name or path/to/file.py:name"


class ExtensionError(RoentgenError, ValueError):
    """An extension cannot be found or loaded; the message says what was searched for, and where."""


@dataclass(frozen=True)
class Extension(Generic[T]):
    """An extension, with its name and reference."""

    value: T
    """The object."""
    name: str
    """Its name in the registry, or the object's own name."""
    reference: str | None = None
    """Reference that finds it again, also in another process; None for a given object and for a built-in one."""
    digest: str | None = None
    """Hash of its source; None of what is built in."""

    @property
    def built_in(self) -> bool:
        """Whether this package provides it."""
        return self.digest is None


@dataclass(frozen=True)
class Registry(Generic[T]):
    """The registered names of one kind of extension."""

    group: str
    """Entry point group, such as "roentgen.extractors"."""
    built_in: Mapping[str, T]
    """Built-in extensions, by name."""

    @property
    def names(self) -> list[str]:
        """All names: built-in ones, then those of installed packages."""
        return [*self.built_in, *(name for name in self._declared() if name not in self.built_in)]

    def __getitem__(self, name: str) -> T:
        """Return a built-in extension."""
        return self.built_in[name]

    def __contains__(self, name: object) -> bool:
        return name in self.built_in or name in self._declared()

    def find(self, name: str, otherwise: str = "") -> Extension[Any]:
        """Return the extension of a name or a reference.

        Args:
            name: a name in this registry, or a reference.
            otherwise: text about other allowed values, for the error message.

        Raises:
            ExtensionError: if it is neither, or cannot be loaded.
        """
        if name in self.built_in:
            return Extension(self.built_in[name], name)
        if name in (declared := self._declared()):
            return _found(_load_entry_point(name, declared[name], self.group), name, name)
        if in_file := _IN_FILE.fullmatch(name):
            path = Path(in_file["file"]).expanduser().absolute()
            value = _attribute(_import_file(path), in_file["attribute"], name)
            return _found(value, display_name(value, in_file["attribute"]), f"{path}:{in_file['attribute']}")
        if in_module := _IN_MODULE.fullmatch(name):
            value = _attribute(_import_module(in_module["module"], name), in_module["attribute"], name)
            return _found(value, display_name(value, in_module["attribute"]), name)
        close = get_close_matches(name, self.names, 1)
        raise ExtensionError(
            f"{name!r} is unknown; allowed are {', '.join(self.names)}{otherwise}, and {HOW_TO_REFER}"
            + (f". Did you mean {close[0]}?" if close else "")
        )

    def _declared(self) -> Mapping[str, str]:
        return {point.name: point.value for point in entry_points(group=self.group)}


def given(value: T) -> Extension[T]:
    """Return a given object as an extension."""
    return _found(value, display_name(value, "given"), None)


def is_reference(text: str) -> bool:
    """Return whether a text is a reference to an object in a module or a file."""
    return bool(_IN_FILE.fullmatch(text) or _IN_MODULE.fullmatch(text))


def file_of(reference: str) -> tuple[Path, str] | None:
    """Return the file and the attribute of a reference to a file; None for other texts."""
    match = _IN_FILE.fullmatch(reference)
    return None if match is None else (Path(match["file"]).expanduser().absolute(), match["attribute"])


def in_file(reference: str) -> str | None:
    """Return a reference as `file.py:name` if its object is in a single user file; None for packages."""
    if (named := file_of(reference)) is not None:
        return f"{named[0]}:{named[1]}"
    module, _, attribute = reference.partition(":")
    if "." in module:
        return None
    loaded = _import_module(module, reference)
    file = str(loaded.__file__ or "")
    return f"{file}:{attribute}" if is_users_module(loaded) and Path(file).name == f"{module}.py" else None


def display_name(value: Any, otherwise: str) -> str:
    """Return the name of a function or an object, with characters that are allowed in a column's name."""
    if isinstance(value, partial):
        return display_name(value.func, otherwise)
    own = getattr(value, "__name__", None) or (type(value).__name__ if callable(value) else None)
    return re.sub(r"[^\w.-]+", "", str(own or otherwise).rpartition(".")[2]) or otherwise


def _found(value: Any, name: str, reference: str | None) -> Extension[Any]:
    return Extension(value, name, reference, fingerprint(value))


def _attribute(module: ModuleType, attribute: str, reference: str) -> Any:
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            public = [name for name, one in vars(module).items() if not name.startswith("_") and _is_own(one, module)]
            there = f"it defines {', '.join(public)}" if public else "it defines nothing"
            raise ExtensionError(f"{reference!r}: {_file_of(module)} has no {attribute!r}; {there}")
        value = getattr(value, part)
    return value


def _is_own(value: Any, module: ModuleType) -> bool:
    return not isinstance(value, ModuleType) and getattr(value, "__module__", module.__name__) == module.__name__


def _file_of(module: ModuleType) -> str:
    return str(module.__file__ or module.__name__)


def _import_module(name: str, reference: str) -> ModuleType:
    folder = Path.cwd()
    with _first_on_path(folder):
        try:
            missing = importlib.util.find_spec(name.partition(".")[0]) is None
        except (ImportError, ValueError):
            missing = True
        if missing:
            raise ExtensionError(f"{reference!r}: there is no module {name!r} in {folder} or in the installed packages")
        return _imported(partial(importlib.import_module, name), name)


def _import_file(path: Path) -> ModuleType:
    """Import a file as a separate module, once per process."""
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise ExtensionError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ExtensionError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a module up while it is executed
    try:
        with _first_on_path(path.parent):
            _imported(partial(spec.loader.exec_module, module), str(path))
    except ExtensionError:
        del sys.modules[name]
        raise
    return module


def _imported(load: Callable[[], T], what: str) -> T:
    try:
        return load()
    except Exception as error:
        line = f" (line {error.lineno})" if isinstance(error, SyntaxError) else ""
        raise ExtensionError(f"{what} cannot be imported: {type(error).__name__}: {error}{line}") from error


def _load_entry_point(name: str, value: str, group: str) -> Any:
    (point,) = [one for one in entry_points(group=group) if (one.name, one.value) == (name, value)][:1]
    try:
        return _imported(point.load, value)
    except ExtensionError as error:
        raise ExtensionError(f"{name!r}, an entry point of {group}: {error}") from error


@contextmanager
def _first_on_path(folder: Path) -> Iterator[None]:
    """Put a folder first on the import path, for as long as something is imported from it.

    Raises:
        ExtensionError: if that imports a module of the folder, and one of the same name from another folder is loaded: Python
            would have taken that one.
    """
    place = str(folder)
    namesakes = _namesakes(folder)
    for name in namesakes:
        del sys.modules[name]
    sys.path.insert(0, place)
    try:
        yield
    finally:
        sys.path.remove(place)
        clashing = sorted(namesakes.keys() & sys.modules.keys())
        sys.modules.update(namesakes)
    if clashing:
        other = namesakes[clashing[0]].__file__
        raise ExtensionError(
            f"{folder} has a module {clashing[0]!r}, but another module of this name is loaded ({other}); rename one of them"
        )


def _namesakes(folder: Path) -> dict[str, ModuleType]:
    """Return a user's loaded modules with the same names as other modules in a folder."""
    here = {file.stem: file for file in folder.glob("*.py")} | {
        file.parent.name: file for file in folder.glob("*/__init__.py")
    }
    others = set()
    for name in here.keys() & sys.modules.keys():
        loaded = getattr(sys.modules[name], "__file__", None)
        if isinstance(loaded, str) and Path(loaded).absolute() != here[name] and is_users_module(sys.modules[name]):
            others.add(name)
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in others}
