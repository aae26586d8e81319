"""Makes a user's functions picklable for processes that may not have their files.

A function is pickled as a reference to its module, which the other process imports. That works for installed packages, but not
for a file in a working directory. So the modules of such a file's folder are pickled by value, with the function.
"""

import site
import sys
import sysconfig
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

OWN_PACKAGES = frozenset({"roentgen", "eval_jobs", "probes", "serve_app"})
"""Packages that every process has."""


def make_portable(*values: Any) -> None:
    """Make functions and objects picklable by value, with the imported modules of their folders."""
    from ray import cloudpickle

    roots = {root for value in values if (root := _root(_module_of(value))) is not None}
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and _root(module) in roots:
            cloudpickle.register_pickle_by_value(module)


def imported_beside(file: Path) -> list[Path]:
    """Return the files of other user modules that this process has imported from a file's folder."""
    modules = [module for module in list(sys.modules.values()) if isinstance(module, ModuleType)]
    files = {Path(str(module.__file__)).absolute() for module in modules if _root(module) == file.parent}
    return sorted(files - {file})


def is_users(value: Any) -> bool:
    """Return whether a function or a class is defined in a user's file, the main program or a notebook, not in a library."""
    module = sys.modules.get(getattr(value, "__module__", None) or "")
    return module is not None and is_users_module(module)


def is_users_module(module: ModuleType) -> bool:
    """Return whether a module is a user's file, the main program or a notebook, not a library."""
    return module.__name__ == "__main__" or _root(module) is not None


def _module_of(value: Any) -> ModuleType | None:
    while isinstance(value, partial):
        value = value.func
    own = value if getattr(value, "__module__", None) and hasattr(value, "__qualname__") else type(value)
    return sys.modules.get(own.__module__)


def _root(module: ModuleType | None) -> Path | None:
    """Return the folder that a user's module is imported from; None for libraries and the main program."""
    if module is None or module.__name__ == "__main__":
        return None
    top = module.__name__.partition(".")[0]
    file = getattr(module, "__file__", None)
    if top in OWN_PACKAGES or not isinstance(file, str) or any(Path(file).is_relative_to(p) for p in _installed()):
        return None
    # The depth of a.b.c below its root is its number of dots, plus one if it is a package.
    depth = module.__name__.count(".") + Path(file).name.startswith("__init__.")
    parents = Path(file).absolute().parents
    return parents[depth] if depth < len(parents) else None


@cache
def _installed() -> tuple[Path, ...]:
    """Return the folders of the standard library and of installed packages."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    paths = [*(sysconfig.get_path(name) for name in names), *site.getsitepackages(), site.getusersitepackages()]
    # Stacked environments have several package folders.
    paths += [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages", "lib-dynload")]
    return tuple(dict.fromkeys(Path(path) for path in paths))
