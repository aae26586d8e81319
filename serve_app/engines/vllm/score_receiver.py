"""Fetches the scores of probes from vLLM's workers to the replica, where streams emit them.

A worker scores rows step by step and keeps the scores. They are fetched for all jobs together, and never concurrently: a fetch
is a call between two of vLLM's steps and delays the next step. So while streams run, scores are fetched at an interval; a
stream emits the scores that have arrived and does not wait for others. When a job has ended, the missing scores are waited
for.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

from torch import Tensor

from serve_app.capture.probe_scores import NewScores, RequestProbe, RequestScores, UnscorableError

Fetch = Callable[[list[str]], Awaitable[dict[str, NewScores]]]


INTERVAL_S = 0.02
"""Interval between fetches for streams, in seconds."""


class ScoreReceiver:
    """Receives the scores of all jobs with probes. It runs on the engine's loop."""

    def __init__(self, fetch: Fetch) -> None:
        """Create a receiver without jobs.

        Args:
            fetch: asks the workers for new scores.
        """
        self._fetch = fetch
        self._jobs: dict[str, RequestScores] = {}
        self._fetching: asyncio.Task[None] | None = None
        self._fetched = -INTERVAL_S

    def begin(self, job_id: str, probes: tuple[RequestProbe, ...]) -> None:
        """Start receiving a job's scores."""
        self._jobs[job_id] = RequestScores(probes)

    def forget(self, job_id: str) -> None:
        """Stop receiving a job's scores."""
        self._jobs.pop(job_id, None)

    def new_scores(self, job_id: str, n_rows: int) -> list[Tensor]:
        """Return a job's scores that have not been emitted, and start the next fetch.

        Args:
            job_id: the job.
            n_rows: number of the job's rows, as far as is known; scores of later rows are not returned.
        """
        if time.monotonic() - self._fetched >= INTERVAL_S:
            self._start()
        return self._jobs[job_id].take(n_rows)

    async def all(self, job_id: str, n_rows: int) -> list[Tensor]:
        """Return all scores of a job that has ended.

        Raises:
            UnscorableError: if scores are missing.
        """
        job = self._jobs[job_id]
        while job.n_scored < n_rows and job.failure is None:
            before = job.n_scored
            if self._fetching is not None:
                await asyncio.shield(self._fetching)  # it may have started before the last rows were scored
            await asyncio.shield(self._start())
            if job.n_scored == before and job.failure is None:
                raise UnscorableError(f"{before} tokens of this request were scored; {n_rows} were expected")
        return [scores[:n_rows] for scores in job.all()]

    def _start(self) -> "asyncio.Task[None]":
        if self._fetching is None or self._fetching.done():
            self._fetching = asyncio.create_task(self._receive())
        return self._fetching

    async def _receive(self) -> None:
        self._fetched = time.monotonic()
        for job_id, new in (await self._fetch(list(self._jobs))).items():
            if job_id in self._jobs:
                self._jobs[job_id].receive(new)
