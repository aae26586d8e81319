"""Brings the scores of probes from vLLM's workers to the replica, where streams tell them.

A worker scores rows step by step and keeps the scores. They are fetched for all jobs at once, and never twice at a time: a
fetch is a call between two of vLLM's steps. A stream does not wait for them; it tells those that have come. When a job has
ended, whatever is missing is waited for.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from torch import Tensor

from serve_app.capture.scoring import NewScores, RequestScores, Scorer, UnscorableError

Fetch = Callable[[list[str]], Awaitable[dict[str, NewScores]]]


@dataclass
class JobScores:
    """One job's scores, as far as they have come."""

    found: RequestScores
    told: int = 0


class ScoreBoard:
    """The scores of all jobs that have probes. It lives on the engine's loop."""

    def __init__(self, fetch: Fetch) -> None:
        """Begin without jobs.

        Args:
            fetch: asks the workers for what has come since the last time.
        """
        self._fetch = fetch
        self._jobs: dict[str, JobScores] = {}
        self._fetching: asyncio.Task[None] | None = None

    def begin(self, job_id: str, probes: tuple[Scorer, ...]) -> None:
        """Expect a job's scores."""
        self._jobs[job_id] = JobScores(RequestScores(probes))

    def forget(self, job_id: str) -> None:
        """Expect none of a job any more."""
        self._jobs.pop(job_id, None)

    def news(self, job_id: str, n_rows: int) -> list[Tensor]:
        """Return the scores of a job that have not been told, and have more fetched.

        Args:
            job_id: which.
            n_rows: the rows that the job has, as far as is known; scores beyond belong to nobody.
        """
        self._start()
        job = self._jobs[job_id]
        start, job.told = job.told, max(job.told, min(job.found.fed, n_rows))
        return [scores[start : job.told] for scores in job.found.all()] if job.told > start else []

    async def all(self, job_id: str, n_rows: int) -> list[Tensor]:
        """Return all scores of a job that has ended.

        Raises:
            UnscorableError: if they cannot be had.
        """
        job = self._jobs[job_id]
        while job.found.fed < n_rows and job.found.failure is None:
            before = job.found.fed
            if self._fetching is not None:
                await asyncio.shield(self._fetching)  # it may have been asked for before the last rows were there
            await asyncio.shield(self._start())
            if job.found.fed == before:
                raise UnscorableError(f"{before} tokens of this request were scored, not {n_rows}")
        return [scores[:n_rows] for scores in job.found.all()]

    def _start(self) -> "asyncio.Task[None]":
        if self._fetching is None or self._fetching.done():
            self._fetching = asyncio.create_task(self._take_in())
        return self._fetching

    async def _take_in(self) -> None:
        for job_id, new in (await self._fetch(list(self._jobs))).items():
            if job_id in self._jobs:
                self._jobs[job_id].found.take_in(new)
