"""Brings the scores of probes from vLLM's workers to the replica, where streams tell them.

A worker scores rows step by step and keeps the scores. They are fetched for all jobs at once, and never twice at a time: a
fetch is a call between two of vLLM's steps, and holds up the next. So while streams run it is made at an interval; a stream
does not wait for scores, it tells those that have come. When a job has ended, whatever is missing is waited for.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

from torch import Tensor

from serve_app.capture.probe_scores import NewScores, RequestProbe, RequestScores, UnscorableError

Fetch = Callable[[list[str]], Awaitable[dict[str, NewScores]]]


INTERVAL_S = 0.02
"""From one fetch for streams to the next."""


class ScoreReceiver:
    """The scores of all jobs that have probes. It lives on the engine's loop."""

    def __init__(self, fetch: Fetch) -> None:
        """Begin without jobs.

        Args:
            fetch: asks the workers for what has come since the last time.
        """
        self._fetch = fetch
        self._jobs: dict[str, RequestScores] = {}
        self._fetching: asyncio.Task[None] | None = None
        self._fetched = -INTERVAL_S

    def begin(self, job_id: str, probes: tuple[RequestProbe, ...]) -> None:
        """Expect a job's scores."""
        self._jobs[job_id] = RequestScores(probes)

    def forget(self, job_id: str) -> None:
        """Expect none of a job any more."""
        self._jobs.pop(job_id, None)

    def new_scores(self, job_id: str, n_rows: int) -> list[Tensor]:
        """Return the scores of a job that have not been told, and have more fetched.

        Args:
            job_id: which.
            n_rows: the rows that the job has, as far as is known; scores beyond belong to nobody.
        """
        if time.monotonic() - self._fetched >= INTERVAL_S:
            self._start()
        return self._jobs[job_id].take(n_rows)

    async def all(self, job_id: str, n_rows: int) -> list[Tensor]:
        """Return all scores of a job that has ended.

        Raises:
            UnscorableError: if they cannot be had.
        """
        job = self._jobs[job_id]
        while job.n_scored < n_rows and job.failure is None:
            before = job.n_scored
            if self._fetching is not None:
                await asyncio.shield(self._fetching)  # it may have been asked for before the last rows were there
            await asyncio.shield(self._start())
            if job.n_scored == before and job.failure is None:
                raise UnscorableError(f"{before} tokens of this request were scored, not {n_rows}")
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
