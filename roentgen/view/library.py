"""The sources that have been opened: each once, and brought up to date when it is asked for again."""

import logging
import threading
import time
from collections.abc import Iterable

from roentgen.errors import RoentgenError
from roentgen.store import StoreError
from roentgen.view.catalog import Catalog, Found
from roentgen.view.schemas import Source
from roentgen.view.sources import OpenRun, OpenSession, OpenSource, unreadable

log = logging.getLogger(__name__)

REST = 5
"""After a refresh of a table, the next waits this many times as long as it took, and at least a second."""


class Library:
    """The runs and sessions that can be looked at."""

    def __init__(self, addresses: Iterable[str]) -> None:
        """Look at what some addresses name.

        Raises:
            StoreError: if one is of a kind that nothing can be at.
        """
        self._catalog = Catalog(addresses)
        self._open: dict[str, OpenSource] = {}
        self._next: dict[str, float] = {}
        self._lock = threading.RLock()

    def get(self, source: str) -> OpenSource:
        """Return an open source, up to date.

        Raises:
            ViewError: 404 if there is none.
            RoentgenError: if it cannot be read.
        """
        with self._lock:
            known = self._open.get(source)
        return self._fresh(known.found if known else self._catalog.get(source))

    def describe(self) -> list[Source]:
        """Return a line for every source; of one that cannot be read, why."""
        lines = []
        for found in self._catalog.list():
            try:
                lines.append(self._fresh(found).describe())
            except (RoentgenError, OSError) as error:
                log.warning("%s cannot be shown: %s", found.place.uri, error)
                lines.append(unreadable(found, error))
        return lines

    def session(self, uri: str) -> OpenSession:
        """Return the session at an address, which a run names.

        Raises:
            StoreError: if there is none.
        """
        found = Catalog([uri]).list()
        source = self._fresh(found[0]) if found else None
        if not isinstance(source, OpenSession):
            raise StoreError(f"{uri} is not a session (any more)")
        return source

    def _fresh(self, found: Found) -> OpenSource:
        with self._lock:
            if found.id not in self._open:
                run = found.kind == "run"
                self._open[found.id] = OpenRun(found, self.session) if run else OpenSession(found)
            source = self._open[found.id]
            if time.monotonic() >= self._next.get(found.id, 0):
                began = time.monotonic()
                source.table.refresh()
                took = time.monotonic() - began
                self._next[found.id] = time.monotonic() + max(1.0, REST * took)
        return source
