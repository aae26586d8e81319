"""Which runs and sessions an address names: a run, a session, or a folder that holds some, on a disk or in a bucket.

A folder is listed again each time it is asked for, so that a run that begins later appears. The files of a run in a bucket are
small and are copied into the cache folder, where they are read as any run's are; rows stay in the bucket.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from roentgen.atomic_files import atomic_write, make_folder, write_chunks
from roentgen.model_names import cache_folder
from roentgen.store import StoreError
from roentgen.store.storage_backends import LocalFolder, StorageFolder, open_folder
from roentgen.view.errors import ViewError
from roentgen.view.schemas import Kind

RUN_FILES = ("config.json", "samples.jsonl", "summary.json")
"""What of a run in a bucket is copied, beside its probes."""


@dataclass(frozen=True)
class Found:
    """A run or a session."""

    id: str
    """Names it in addresses: its name and a hash of its place."""
    kind: Kind
    """Which of the two."""
    place: StorageFolder
    """Its folder."""

    @property
    def name(self) -> str:
        """Its folder's name."""
        return self.place.name


class Catalog:
    """The runs and sessions at some addresses."""

    def __init__(self, addresses: Iterable[str]) -> None:
        """Look at addresses later, each time anew.

        Raises:
            StoreError: if one is of a kind that nothing can be at.
        """
        self._roots = [open_folder(address) for address in addresses]

    def list(self) -> list[Found]:
        """Return what there is now, each once, in the order of the addresses.

        Raises:
            StoreError: if a place cannot be reached.
        """
        try:
            found = [one for root in self._roots for one in _inside(root)]
        except OSError as error:
            raise StoreError(f"a folder cannot be listed: {error}") from error
        return list({one.id: one for one in found}.values())

    def get(self, source: str) -> Found:
        """Return a run or a session by its id.

        Raises:
            ViewError: 404 if there is none.
        """
        for one in self.list():
            if one.id == source:
                return one
        raise ViewError(f"there is no source {source!r}", 404)


def check_addresses(addresses: Iterable[str]) -> None:
    """Make sure that something is at each of some addresses.

    Raises:
        ViewError: naming the first where nothing is.
    """
    for address in addresses:
        if not Catalog([address]).list():
            raise ViewError(f"{address}: there is no run (config.json), session (session.json) or folder with some")


def local_run(found: Found) -> Path:
    """Return a folder of this machine that has the files of a run."""
    if isinstance(found.place, LocalFolder):
        return found.place.path
    here = cache_folder() / "view" / "runs" / found.id
    labels = [found.place.child("probes").child(name) for name in found.place.child("probes").folders()]
    for place, inside, names in [
        (found.place, here, RUN_FILES),
        *(
            (label, here / "probes" / label.name, ("probes.json", "probes.safetensors", "results.json"))
            for label in labels
        ),
    ]:
        for entry in place.entries():
            file = inside / entry.name
            if entry.name in names and not (file.exists() and file.stat().st_mtime == entry.modified):
                _copy(place, entry.name, file, entry.modified)
    return here


def _copy(place: StorageFolder, name: str, file: Path, modified: float) -> None:
    make_folder(file.parent)
    with atomic_write(file) as temporary:
        write_chunks(temporary, place.stream(name)[1])
    os.utime(file, (modified, modified))


def _inside(root: StorageFolder) -> Iterator[Found]:
    """Yield what a folder is, or else what is directly in it."""
    kind = _kind(root)
    if kind is not None:
        yield _found(kind, root)
        return
    for name in root.folders():
        place = root.child(name)
        if not name.startswith(".") and (kind := _kind(place)) is not None:
            yield _found(kind, place)


def _kind(place: StorageFolder) -> Kind | None:
    if isinstance(place, LocalFolder):  # of which any number may hold thousands of files
        there = {name for name in ("session.json", "config.json") if (place.path / name).is_file()}
    else:
        there = {entry.name for entry in place.entries()}
    if "session.json" in there:
        return "session"
    # The folder of a model has a config.json too.
    return "run" if "config.json" in there and b'"config_hash"' in place.read("config.json") else None


def _found(kind: Kind, place: StorageFolder) -> Found:
    digest = hashlib.sha256(place.uri.encode()).hexdigest()[:8]
    return Found(f"{re.sub('[^A-Za-z0-9_.-]', '-', place.name)[:60]}-{digest}", kind, place)
