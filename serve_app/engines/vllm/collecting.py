"""The rows of the requests in one vLLM worker: cut from every step's whole batch, held until the replica says what was said.

Four things are unlike an engine that runs the model itself, and are settled here:

- vLLM packs its batch: it has no padding (`PackedBatch`).
- A request may be preempted: its rows so far are kept, and when vLLM computes them again, only what is new counts.
- A request may overrun. Where its end is decided in another process (a stop string, or a step that was scheduled before the
  last one's token was known), rows come that belong to no token of the completion: they are dropped (`capture.late_end`).
- vLLM may find a prompt's first tokens in its prefix cache, also such as another request computes in the very same step. Their
  rows are taken from those that are kept of earlier prompts (`prefix_rows`), after that step.

A request whose rows are not exactly those of its prompt and all but the last token of its completion fails (`LostRowsError`).
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import accumulate

import torch

from roentgen.linear_probe import LinearProbe
from roentgen.store import StoreError
from serve_app.capture.batch_layout import PackedBatch
from serve_app.capture.late_end import RowsMissingError, collecting_plan, finalize_rows
from serve_app.capture.probe_scores import NewScores, RequestProbe, RequestScores, StepScores, UnscorableError
from serve_app.capture.row_memory import RowMemory
from serve_app.capture.rows import CapturedRows, CapturePlan, KnownRows, RequestRows, StepRows
from serve_app.capture.steering import SteeringVector, StepSteering
from serve_app.capture.structure import Tap
from serve_app.engines.prefix_blocks import filler_plan, name_blocks, needed_taps
from serve_app.engines.probe_stopping import Action, StopWatch
from serve_app.engines.vllm.prefix_rows import PrefixRows
from serve_app.engines.vllm.worker_messages import CaptureRequest

log = logging.getLogger(__name__)

SETTLED = 2
"""Steps after which a step's rows are surely on the host, so that nothing waits for them."""

MAX_PROBES = 256
"""Probes whose numbers are kept on the model's device."""


class LostRowsError(StoreError):
    """Rows of a request are not there, so what it asked for cannot be kept."""


@dataclass(eq=False)
class _Job:
    """One request: what it asked for, how many of its tokens have been processed, and its rows so far."""

    request: CaptureRequest
    prompt_ids: list[int]
    rows: RequestRows | None
    scores: RequestScores | None
    names: list[bytes] = field(default_factory=list)
    """Of its prompt's blocks, where rows are kept for other prompts."""
    filler: RequestRows | None = None
    """Keeps rows that blocks need and its own capture does not have."""
    kept: int = 0
    """Blocks of its prompt that others may have rows of."""
    found: int = 0
    """Tokens that vLLM has found in its cache, whose rows have not been taken yet."""
    n_processed: int = 0
    lost: str | None = None
    watch: StopWatch | None = None
    """There if its scores may act."""

    @property
    def capture(self) -> CapturePlan | None:
        """What it keeps."""
        return self.request.capture

    @property
    def steering(self) -> Sequence[SteeringVector]:
        """What is added to its rows."""
        return self.request.steering

    @property
    def probes(self) -> Sequence[RequestProbe]:
        """What its rows are scored with."""
        return self.request.probes

    @property
    def cache_salt(self) -> str | None:
        """The client's."""
        return self.request.cache_salt

    @property
    def n_prompt(self) -> int:
        """Tokens in its prompt."""
        return len(self.prompt_ids)


@dataclass(frozen=True)
class StepCapture:
    """One forward's observers: what adds to the batch, then what reads it."""

    steering: StepSteering | None
    rows: StepRows | None
    fills: StepRows | None
    scores: StepScores | None
    jobs: list[_Job] = field(repr=False)
    token_stops: list[int] = field(repr=False)
    """Per job, the place behind its last token in the batch."""

    @property
    def may_act(self) -> bool:
        """Whether scores of a job in it may act; the same on every rank."""
        return any(job.watch is not None for job in self.jobs)


class Collector:
    """The rows of one worker's requests."""

    def __init__(self, device: torch.device, prefixes: PrefixRows | None = None) -> None:
        """Begin without requests.

        Args:
            device: the model's.
            prefixes: keeps rows of prompts, where vLLM has a prefix cache.
        """
        self._jobs: dict[str, _Job] = {}
        self._prefixes = prefixes
        self._steps = 0
        self._to_keep: deque[tuple[int, _Job]] = deque()
        self._memory = RowMemory()
        self._device = device
        self._probes: dict[bytes, LinearProbe] = {}

    @property
    def n_jobs(self) -> int:
        """Jobs whose rows are here."""
        return len(self._jobs)

    @property
    def prefix_bytes(self) -> int:
        """Bytes of rows that are kept for prompts to come."""
        return self._prefixes.nbytes if self._prefixes is not None else 0

    def begin(self, request: CaptureRequest, prompt_ids: list[int]) -> None:
        """Take a request that has been admitted; one that is known already has been preempted and comes back."""
        if request.job_id in self._jobs:
            return
        plan, n_prompt = request.capture, len(prompt_ids)
        rows = RequestRows(collecting_plan(plan, n_prompt), n_prompt, self._memory) if plan is not None else None
        scores = RequestScores(tuple(self._shared(scorer) for scorer in request.probes)) if request.probes else None
        watch = StopWatch(request.stopping, prompt_ids) if request.stopping is not None else None
        job = self._jobs[request.job_id] = _Job(request, prompt_ids, rows, scores, watch=watch)
        if self._prefixes is None or not needed_taps(job, range(n_prompt - 1)):
            return
        job.names = name_blocks(job, prompt_ids, self._prefixes.size)
        extra = filler_plan(job, len(job.names) * self._prefixes.size)
        if extra is not None:
            job.filler = RequestRows(extra, n_prompt, self._memory)

    def step(self, spans: list[tuple[str | None, range]]) -> StepCapture | None:
        """Lay out a forward; None if nothing is to be done in it.

        Args:
            spans: in the batch's order, the job and the sequence positions that it holds.
        """
        self._steps += 1
        self._keep_until(self._steps - SETTLED)
        jobs = [self._jobs.get(job_id) if job_id is not None else None for job_id, _ in spans]
        known = [job for job in jobs if job is not None]
        if not known:
            return None
        lengths = [len(span) for _, span in spans]
        steered = [job.request.steering if job is not None else () for job in jobs]
        steering = None
        if any(steered):
            prompts = [job.n_prompt if job is not None else 0 for job in jobs]
            steering = StepSteering(steered, prompts, PackedBatch([span for _, span in spans]))
        new = [_new(job, span) for job, (_, span) in zip(jobs, spans, strict=True)]
        capturing = [job for job in known if job.rows is not None]
        rows = None
        if capturing:
            rows = StepRows(
                [job.rows if job is not None else None for job in jobs], PackedBatch(new, lengths), self._memory
            )
        fills = None
        if any(job.filler is not None for job in known):
            fills = StepRows(
                [job.filler if job is not None else None for job in jobs], PackedBatch(new, lengths), self._memory
            )
        scores = None
        if any(job.scores is not None for job in known):
            asked = [job.scores if job is not None else None for job in jobs]
            scores = StepScores(asked, PackedBatch(new, lengths), self._memory)
        token_stops = [end for job, end in zip(jobs, accumulate(lengths), strict=True) if job is not None]
        return StepCapture(steering, rows, fills, scores, known, token_stops)

    def done(self, step: StepCapture, failure: Exception | None) -> None:
        """Give each job of a forward its rows, once it has been issued.

        Args:
            step: the forward.
            failure: why its rows could not be read, if so.
        """
        if failure is not None:
            for job in step.jobs:
                job.lost = job.lost or f"{type(failure).__name__}: {failure}"
            return
        for rows in (step.rows, step.fills):
            if rows is not None:
                rows.deliver()
        if step.scores is not None:
            step.scores.deliver()
        self._to_keep += [(self._steps, job) for job in step.jobs if job.kept < len(job.names)]

    def asked(self, step: StepCapture, token_ids: Callable[[], list[int]]) -> dict[str, Action]:
        """Return what the scores of a forward ask for before its next tokens are chosen, by job.

        Args:
            step: the forward, whose scores are there.
            token_ids: returns all tokens that it was given.
        """
        found: dict[str, Action] = {}
        tokens: list[int] | None = None
        for job, end in zip(step.jobs, step.token_stops, strict=True):
            if job.watch is None or job.scores is None or job.lost is not None or job.n_processed <= job.watch.next:
                continue
            count = job.n_processed - job.watch.next
            tokens = token_ids() if tokens is None else tokens
            try:
                action = job.watch.see(tokens[end - count : end], job.scores.last(count))
            except UnscorableError as error:
                job.scores.failure = error  # the replica is told when it asks for the scores
                continue
            if action is not None:
                found[job.request.job_id] = action
        return found

    def request(self, job_id: str) -> CaptureRequest:
        """Return a job's capture request."""
        return self._jobs[job_id].request

    def take(self, job_id: str, fed: Sequence[int]) -> CapturedRows:
        """Return a finished job's rows and forget it.

        Args:
            job_id: which.
            fed: the tokens that should have a row: all but the last one.

        Raises:
            LostRowsError: if they are not all there.
            UncapturableError: if what it asked for has no row per token.
        """
        self.resumed(job_id)
        job, n_rows = self._jobs.pop(job_id, None), len(fed)
        if job is None or job.rows is None or job.request.capture is None:
            raise LostRowsError("the worker has no rows of this request")
        if job.lost is not None:
            raise LostRowsError(job.lost)
        if job.n_processed < n_rows:
            raise LostRowsError(f"{job.n_processed} tokens of this request passed through the model, not {n_rows}")
        try:
            rows = finalize_rows(job.rows.cut(), job.request.capture, job.n_prompt, n_rows)
        except RowsMissingError as error:
            raise LostRowsError(str(error)) from error
        if self._prefixes is not None and job.names:
            # The next turn of a conversation begins with what this one has said.
            job.names = name_blocks(job, fed, self._prefixes.size, job.names)
            self._keep(job, n_rows)
        return rows

    def resumed(self, job_id: str) -> bool:
        """Take the rows of what vLLM has found of a job's prompt; returns whether none is missing."""
        job = self._jobs.get(job_id)
        if job is None:
            return True
        if job.found and job.lost is None:
            self._keep_until(self._steps)
            self._resume(job)
        return job.lost is None

    def _resume(self, job: _Job) -> None:
        count, job.found = job.found, 0
        size = self._prefixes.size if self._prefixes is not None else count
        spans = [range(start, min(start + size, count)) for start in range(0, count, size)]
        taps = [needed_taps(job, span) for span in spans]
        if not any(taps):
            return
        blocks = (
            self._prefixes.use(job.names[: len(spans)], taps)
            if len(job.names) >= len(spans) and self._prefixes
            else None
        )
        if blocks is None:
            job.lost = f"the rows of {count} tokens that were found in the prefix cache are not here any more"
            return
        if job.rows is not None:
            kept = [job.rows.kept(span) for span in spans]
            job.rows.resume(
                [KnownRows(part, span.start, rows) for part, span, rows in zip(kept, spans, blocks, strict=True)]
            )
        if job.scores is not None:
            read = {probe.tap for probe in job.scores.probes}
            job.scores.resume(count, {tap: torch.cat([rows[tap] for rows in blocks])[:count] for tap in read})

    def _keep_until(self, step: int) -> None:
        """Keep rows of prompts for others, of those that were read up to a step."""
        while self._to_keep and self._to_keep[0][0] <= step:
            _, job = self._to_keep.popleft()
            self._keep(job, min(job.n_processed, job.n_prompt))

    def _keep(self, job: _Job, until: int) -> None:
        """Keep rows of a job's blocks for others."""
        if self._prefixes is None or job.lost is not None:
            return
        size = self._prefixes.size
        sources = [rows for rows in (job.rows, job.filler) if rows is not None]
        taps = {tap for rows in sources for tap in rows.plan.taps.values()}
        for number in range(job.kept, until // size):
            lacking = self._prefixes.lacks(job.names[number], taps)
            found: dict[Tap, torch.Tensor] = {}
            for rows in sources:
                if wanted := lacking - found.keys():
                    found |= rows.between(number * size, (number + 1) * size, wanted)
            self._prefixes.add(job.names[number], found)
        job.kept = until // size
        if job.n_processed >= job.n_prompt:
            job.filler = None

    def scores(self, job_ids: Iterable[str]) -> dict[str, NewScores]:
        """Return the scores that have come since the last time, of those of these jobs that are here.

        A job whose rows are lost has the reason among its scores.
        """
        found = {}
        for job_id in job_ids:
            self.resumed(job_id)
            job = self._jobs.get(job_id)
            if job is not None and job.scores is not None:
                if job.lost is not None:
                    job.scores.failure = UnscorableError(job.lost)
                found[job_id] = job.scores.drain()
        return found

    def _shared(self, scorer: RequestProbe) -> RequestProbe:
        """Return the same probe with the one copy of its numbers that all requests share: then one product scores them all."""
        probe = scorer.probe
        parts = (probe.weight, probe.bias, probe.mean, probe.scale)
        digest = blake2b(b"".join(part.cpu().numpy().tobytes() for part in parts), digest_size=16).digest()
        if digest not in self._probes:
            while len(self._probes) >= MAX_PROBES:
                del self._probes[next(iter(self._probes))]
            self._probes[digest] = probe.to(self._device)
        return replace(scorer, probe=self._probes[digest])

    def forget(self, job_id: str) -> None:
        """Drop a job's rows."""
        self._jobs.pop(job_id, None)


def _new(job: _Job | None, span: range) -> range:
    """Return the end of a span that has not been there before, and count it as passed."""
    if job is None:
        return span
    if span.start > job.n_processed and job.n_processed:
        job.lost = job.lost or f"tokens {job.n_processed}–{span.start - 1} did not pass through the model"
    elif span.start > job.n_processed:
        job.found = job.n_processed = span.start
    new = range(min(max(span.start, job.n_processed), span.stop), span.stop)
    job.n_processed = max(job.n_processed, span.stop)
    return new
