"""Canonical names of models. A model has an id, which requests use, and a root, from which it can be loaded.

The root of a folder is its absolute path, of a hub model its hub id, and of the embedded model its name. A folder can be
written in several ways (`models/tiny`, `./models/tiny/`, `~/models/tiny`), which all mean the same model. The cache folder to
which the embedded model is converted means the embedded model.
"""

import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from roentgen.defaults import EMBEDDED_MODEL


def cache_folder() -> Path:
    """Return the cache folder: `$ROENTGEN_CACHE`, by default `~/.cache/roentgen`."""
    return Path(os.environ.get("ROENTGEN_CACHE") or "~/.cache/roentgen").expanduser()


def embedded_folder() -> Path:
    """Return the folder of the converted embedded model."""
    return cache_folder() / "models" / EMBEDDED_MODEL


def canonical_name(name: str) -> str:
    """Return the canonical name of a model; for an existing folder, its absolute path."""
    if name == EMBEDDED_MODEL or not name or "\0" in name:  # not a valid path
        return name
    folder = os.path.expanduser(name)
    if os.path.isdir(folder) or name.startswith((".", "/", "~")):
        path = os.path.abspath(folder)
        return EMBEDDED_MODEL if path == os.path.abspath(embedded_folder()) else path
    return name.rstrip("/")


def is_named(asked: str, names: Iterable[str]) -> bool:
    """Return whether a name, in any form, is one of a model's names."""
    known = set(names)
    return asked in known or canonical_name(asked) in {canonical_name(name) for name in known}


def suggest(asked: str, known: Iterable[str]) -> str:
    """Return a suggestion of similar names, such as `; did you mean 'smollm2-135m'?`; "" if there is none."""
    # Compare names without case, and also without their owner.
    spelled: dict[str, str] = {}
    for name in known:
        spelled.setdefault(name.lower(), name)
        spelled.setdefault(name.rstrip("/").rpartition("/")[2].lower(), name)
    wanted = asked.rstrip("/").lower()
    close = get_close_matches(wanted, spelled, n=3, cutoff=0.75)
    close += get_close_matches(wanted.rpartition("/")[2], spelled, n=3, cutoff=0.75)
    found = list(dict.fromkeys(spelled[one] for one in close))[:2]
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""
