"""Has the workers store what they hold: entries go there, receipts come back, all that have gathered in one exchange.

vLLM calls its workers between two steps, so an exchange must not wait for the disk. It hands over what is new and takes what
is ready; while something is on its way, exchanges follow one another at an interval, which is short when the workers hold no
more rows: nothing then runs that will come to be stored with it.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import Future

from roentgen.store import StoreError
from serve_app.engines.protocol import Finished
from serve_app.engines.rollout import Entry
from serve_app.engines.storage import Stored
from serve_app.engines.vllm.orders import Exchange, Report

log = logging.getLogger(__name__)

INTERVAL_S = 0.05
LAST_INTERVAL_S = 0.01


class WorkerStorage:
    """Stores rows that vLLM's workers hold. Any thread may use it; it runs on the engine's loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, exchange: Callable[[Exchange], Awaitable[Report]]) -> None:
        """Begin with nothing.

        Args:
            loop: the engine's.
            exchange: reaches the workers.
        """
        self._loop = loop
        self._exchange = exchange
        self._keep: dict[str, Entry] = {}
        self._forget: set[str] = set()
        self._waiting: dict[str, Future[Stored]] = {}
        self._has_room = True
        self._running: asyncio.Task[None] | None = None
        self.held = self.kept_bytes = 0

    @property
    def has_room(self) -> bool:
        """Whether the workers' writer keeps up; asking makes sure that it is asked again while it does not."""
        if not self._has_room:
            self._loop.call_soon_threadsafe(self._wake)
        return self._has_room

    def keep(self, entry: Entry, finished: Finished) -> "Future[Stored]":
        """Store a finished generation; the future completes when it is durable, or fails."""
        assert finished.held is not None
        job_id, future = finished.held.job_id, Future[Stored]()

        def put() -> None:
            self._keep[job_id] = entry
            self._waiting[job_id] = future
            self._wake()

        self._loop.call_soon_threadsafe(put)
        return future

    def forget(self, job_id: str) -> None:
        """Drop a job's rows; called on the engine's loop."""
        self._forget.add(job_id)
        self._wake()

    def fail_all(self, error: Exception) -> None:
        """Tell everybody who waits that the workers are gone; called on the engine's loop."""
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            future.set_exception(error)

    def _wake(self) -> None:
        if self._running is None or self._running.done():
            self._running = self._loop.create_task(self._run())

    async def _run(self) -> None:
        while self._keep or self._forget or self._waiting or not self._has_room:
            sent = Exchange(self._keep, frozenset(self._forget))
            self._keep, self._forget = {}, set()
            try:
                report = await self._exchange(sent)
            except Exception as error:
                log.exception("the workers cannot be reached")
                self.fail_all(StoreError(f"the workers that hold the activations cannot be reached: {error}"))
                return
            self._has_room, self.held, self.kept_bytes = report.has_room, report.held, report.kept
            for job_id, stored in report.stored.items():
                self._waiting.pop(job_id).set_result(stored)
            for job_id, failure in report.failed.items():
                self._waiting.pop(job_id).set_exception(failure)
            await asyncio.sleep(INTERVAL_S if report.held else LAST_INTERVAL_S)
