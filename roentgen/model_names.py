"""What people call models: a model has an id, which requests name, and a root, from which it can be loaded anywhere.

The root of a folder is its absolute path, that of a hub's model its id there, and that of the embedded model its name. People
write one folder in many ways (`models/tiny`, `./models/tiny/`, `~/models/tiny`), and all of them mean the same model. The
folder of the cache that the embedded model is converted to means the embedded model.
"""

import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from roentgen.defaults import EMBEDDED_MODEL


def cache_folder() -> Path:
    """Return the cache: `$ROENTGEN_CACHE`, by default `~/.cache/roentgen`."""
    return Path(os.environ.get("ROENTGEN_CACHE") or "~/.cache/roentgen").expanduser()


def embedded_folder() -> Path:
    """Return where the embedded model is kept once it is converted."""
    return cache_folder() / "models" / EMBEDDED_MODEL


def canonical_name(name: str) -> str:
    """Return a model's name in the one spelling that it has from anywhere: a folder that is here as its absolute path."""
    if name == EMBEDDED_MODEL or not name or "\0" in name:  # no file system has that
        return name
    folder = os.path.expanduser(name)
    if os.path.isdir(folder) or name.startswith((".", "/", "~")):
        path = os.path.abspath(folder)
        return EMBEDDED_MODEL if path == os.path.abspath(embedded_folder()) else path
    return name.rstrip("/")


def is_named(asked: str, names: Iterable[str]) -> bool:
    """Return whether a name, however it is spelled, is one of a model's."""
    known = set(names)
    return asked in known or canonical_name(asked) in {canonical_name(name) for name in known}


def suggest(asked: str, known: Iterable[str]) -> str:
    """Return a question that names what was probably meant, `; did you mean 'smollm2-135m'?`; "" if nothing is like it."""
    # Names are compared as people remember them: without case, and also without their owner.
    spelled: dict[str, str] = {}
    for name in known:
        spelled.setdefault(name.lower(), name)
        spelled.setdefault(name.rstrip("/").rpartition("/")[2].lower(), name)
    wanted = asked.rstrip("/").lower()
    close = get_close_matches(wanted, spelled, n=3, cutoff=0.75)
    close += get_close_matches(wanted.rpartition("/")[2], spelled, n=3, cutoff=0.75)
    found = list(dict.fromkeys(spelled[one] for one in close))[:2]
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""
