"""A run that grows, as server-sent events: `progress` whenever samples have been added, until it is complete."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from starlette.concurrency import run_in_threadpool

from roentgen.contract import Positions
from roentgen.errors import RoentgenError
from roentgen.linear_probe import SavedProbe
from roentgen.view.encoding import encoded
from roentgen.view.errors import ViewError
from roentgen.view.library import Library
from roentgen.view.schemas import Progress
from roentgen.view.sources import OpenRun

EVERY_S = 1.0
BEAT_S = 15.0
"""Interval in seconds of the keep-alive comments that stop proxies from closing an idle stream."""
RECENT_S = 60.0
"""Window in seconds over which tokens per second are measured."""
MONITORED = 200
"""The latest samples that a probe is read on."""


async def events(library: Library, source: str, monitor: str = "") -> AsyncIterator[bytes]:
    """Yield the events of a run.

    Args:
        library: what is shown.
        source: the run's id.
        monitor: a saved probe, `RUN/LABEL/NAME`, of this or another run that is shown; it is read on the samples that arrive.

    Raises:
        ViewError: if there is no such run or probe.
    """
    watch = await run_in_threadpool(_Watch, library, source, monitor)
    last, sent = None, time.monotonic()
    while True:
        progress = await run_in_threadpool(watch.look)
        if progress != last:
            yield b"event: progress\ndata: " + encoded(progress) + b"\n\n"
            last, sent = progress, time.monotonic()
            if progress["complete"]:
                return
        elif time.monotonic() - sent > BEAT_S:
            yield b": still here\n\n"
            sent = time.monotonic()
        await asyncio.sleep(EVERY_S)


class _Watch:
    """What one reader of the events has seen."""

    def __init__(self, library: Library, source: str, monitor: str) -> None:
        self._library, self._source = library, source
        self._monitor, self._name = None, monitor
        if not isinstance(library.get(source), OpenRun):
            raise ViewError(f"events: {source} is a session, which has no progress")
        if monitor:
            run, _, name = monitor.partition("/")
            self._monitor = library.get(run or source).probe(name)
        self._scores: deque[float] = deque(maxlen=MONITORED)
        self._scored: set[str] = set()

    def look(self) -> Progress:
        """Return how far the run is now."""
        run = self._library.get(self._source)
        assert isinstance(run, OpenRun)
        about = run.describe()
        return {
            "n_samples": about["n_samples"] or 0,
            "expected": about["expected"],
            "accuracy": about["accuracy"],
            "tokens_per_s": _speed(run) if about["live"] else None,
            "in_flight": _in_flight(run, about["expected"], about["n_samples"] or 0) if about["live"] else 0,
            "failures": {failure["message"]: failure["count"] for failure in run.failures()},
            "monitor": None if self._monitor is None else self._read(run, self._monitor),
            "complete": about["complete"] and not about["live"],
        }

    def _read(self, run: OpenRun, probe: SavedProbe) -> dict[str, Any]:
        newest = run.table.query(
            f"SELECT sample_id FROM samples WHERE error IS NULL ORDER BY finished DESC NULLS LAST LIMIT {MONITORED}"
        ).fetchall()
        for (name,) in reversed(newest):
            if name not in self._scored:
                self._scored.add(name)
                self._scores += _score(run, probe, name)
        n = len(self._scores)
        return {
            "probe": self._name,
            "n": n,
            "mean": sum(self._scores) / n if n else None,
            "share": sum(score > 0 for score in self._scores) / n if n else None,
        }


def _score(run: OpenRun, probe: SavedProbe, sample_id: str) -> list[float]:
    """Return a probe's score of a sample; nothing where its rows are not there or are another model's."""
    try:
        rollout = run.rollout(sample_id, 0)
        policy = str(Positions.parse(probe.card.positions))
        if rollout.session.spec(rollout.place["shard"]).revision != probe.card.revision:
            return []
        row = rollout.session.activations(probe.card.key, where=rollout.frame, positions=policy).stack()
    except (RoentgenError, ValueError):
        return []
    return [float(probe.scores(row.flatten(1))[0, 0])]


def _speed(run: OpenRun) -> float | None:
    since = time.time() - RECENT_S
    tokens, first = run.table.query(
        "SELECT sum(completion_tokens) FILTER (finished > ?), min(finished - seconds) FROM samples", [since]
    ).fetchone() or (None, None)
    return None if tokens is None or first is None else float(tokens) / max(1.0, time.time() - max(first, since))


def _in_flight(run: OpenRun, expected: int | None, done: int) -> int | None:
    parallel = run.run.config.settings.get("parallel")
    if not isinstance(parallel, int):
        return None
    return parallel if expected is None else max(0, min(parallel, expected - done))
