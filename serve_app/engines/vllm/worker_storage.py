"""Stores rows that vLLM's workers hold: metadata goes to the workers, and receipts come back, several in one sync message.

vLLM calls its workers between two steps, so a sync must not wait for the disk. It passes on what is new and returns what is
ready. While a write is in progress, sync messages are sent at an interval. The interval is short once the workers hold no more
rows, since no running request can then join the group commit.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import Future

from roentgen.store import StoreError
from serve_app.engines.protocol import Finished
from serve_app.engines.rollout_metadata import RolloutMetadata
from serve_app.engines.storage import StoredActivations
from serve_app.engines.vllm.worker_messages import SyncMessage, SyncReply

log = logging.getLogger(__name__)

INTERVAL_S = 0.05
LAST_INTERVAL_S = 0.01


class WorkerStorage:
    """Stores rows that vLLM's workers hold. Any thread may call it; it runs on the engine's loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sync: Callable[[SyncMessage], Awaitable[SyncReply]]) -> None:
        """Create an empty storage.

        Args:
            loop: the engine's event loop.
            sync: sends a message to the workers and returns their reply.
        """
        self._loop = loop
        self._sync = sync
        self._keep: dict[str, RolloutMetadata] = {}
        self._forget: set[str] = set()
        self._waiting: dict[str, Future[StoredActivations]] = {}
        self._has_room = True
        self._running: asyncio.Task[None] | None = None
        self.n_jobs = self.prefix_bytes = 0

    @property
    def has_room(self) -> bool:
        """Whether the workers' writer accepts more rows; while it does not, reading this property triggers another sync."""
        if not self._has_room:
            self._loop.call_soon_threadsafe(self._wake)
        return self._has_room

    def keep(self, entry: RolloutMetadata, finished: Finished) -> "Future[StoredActivations]":
        """Store a finished generation; the future completes when it is committed, or fails."""
        assert finished.worker_rows is not None
        job_id, future = finished.worker_rows.job_id, Future[StoredActivations]()

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
        """Fail all pending writes, because the workers are gone; called on the engine's loop."""
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            future.set_exception(error)

    def _wake(self) -> None:
        if self._running is None or self._running.done():
            self._running = self._loop.create_task(self._run())

    async def _run(self) -> None:
        while self._keep or self._forget or self._waiting or not self._has_room:
            sent = SyncMessage(self._keep, frozenset(self._forget))
            self._keep, self._forget = {}, set()
            try:
                reply = await self._sync(sent)
            except Exception as error:
                log.exception("the workers cannot be reached")
                self.fail_all(StoreError(f"the workers that hold the activations cannot be reached: {error}"))
                return
            self._has_room, self.n_jobs, self.prefix_bytes = reply.has_room, reply.n_jobs, reply.prefix_bytes
            for job_id, stored in reply.stored.items():
                self._waiting.pop(job_id).set_result(stored)
            for job_id, failure in reply.failed.items():
                self._waiting.pop(job_id).set_exception(failure)
            await asyncio.sleep(INTERVAL_S if reply.n_jobs else LAST_INTERVAL_S)
