"""Collects the rows of the requests in one vLLM worker, and holds them until they are stored.

Once per step it splits the whole batch's rows by request. Four things differ from an engine that runs the model itself:

- vLLM packs its batch, so there is no padding (`PackedBatch`).
- A request may be preempted. Its rows so far are kept; when vLLM recomputes them, only rows of new tokens are added.
- A request may overrun. If its end is decided in another process (a stop string, or a step that was scheduled before the last
  token was known), rows arrive that belong to no token of the completion. They are dropped (`capture.late_end`).
- vLLM may find a prompt's first tokens in its prefix cache, even tokens that another request computes in the same step. Their
  rows are taken, after that step, from the cached rows of earlier prompts (`prefix_rows`).

A request fails (`LostRowsError`) if its rows are not exactly those of its prompt and of all but the last token of its
completion.
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
"""Number of steps after which a step's rows are on the host, so that nothing waits for them."""

MAX_PROBES = 256
"""Number of probes whose weights are kept on the model's device."""


class LostRowsError(StoreError):
    """Rows of a request are missing, so its capture cannot be stored."""


@dataclass(eq=False)
class _Job:
    """One request: what it asked for, how many of its tokens have been processed, and its rows so far."""

    request: CaptureRequest
    prompt_ids: list[int]
    rows: RequestRows | None
    scores: RequestScores | None
    names: list[bytes] = field(default_factory=list)
    """Names of its prompt's blocks, if rows are cached for other prompts."""
    filler: RequestRows | None = None
    """Captures the rows that blocks need and its own capture does not keep."""
    kept: int = 0
    """Number of its prompt's blocks whose rows have been cached."""
    found: int = 0
    """Tokens that vLLM has found in its prefix cache, whose rows have not been taken yet."""
    n_processed: int = 0
    lost: str | None = None
    watch: StopWatch | None = None
    """Checks its probe scores, if they may stop it."""

    @property
    def capture(self) -> CapturePlan | None:
        """Which rows it keeps."""
        return self.request.capture

    @property
    def steering(self) -> Sequence[SteeringVector]:
        """Vectors that are added to its rows."""
        return self.request.steering

    @property
    def probes(self) -> Sequence[RequestProbe]:
        """Probes that score its rows."""
        return self.request.probes

    @property
    def cache_salt(self) -> str | None:
        """The client's cache salt."""
        return self.request.cache_salt

    @property
    def n_prompt(self) -> int:
        """Tokens in its prompt."""
        return len(self.prompt_ids)


@dataclass(frozen=True)
class StepCapture:
    """What to do in one forward: its steering, then its observers."""

    steering: StepSteering | None
    rows: StepRows | None
    fills: StepRows | None
    scores: StepScores | None
    jobs: list[_Job] = field(repr=False)
    token_stops: list[int] = field(repr=False)
    """Per job, the flat index behind its last token in the batch."""

    @property
    def may_act(self) -> bool:
        """Whether scores of one of its jobs may act; the same on every rank."""
        return any(job.watch is not None for job in self.jobs)


class Collector:
    """Holds the rows of one worker's requests."""

    def __init__(self, device: torch.device, prefixes: PrefixRows | None = None) -> None:
        """Create a collector without requests.

        Args:
            device: the model's device.
            prefixes: caches rows of prompts, if vLLM has a prefix cache.
        """
        self._jobs: dict[str, _Job] = {}
        self._prefixes = prefixes
        self._steps = 0
        self._to_keep: deque[tuple[int, _Job]] = deque()
        self._memory = RowMemory()
        self._device = device
        self._linear_probes: dict[bytes, LinearProbe] = {}

    @property
    def n_jobs(self) -> int:
        """Number of jobs whose rows are held."""
        return len(self._jobs)

    @property
    def prefix_bytes(self) -> int:
        """Bytes of rows that are cached for later prompts."""
        return self._prefixes.nbytes if self._prefixes is not None else 0

    def begin(self, request: CaptureRequest, prompt_ids: list[int]) -> None:
        """Register an admitted request; a known request has been preempted and returns."""
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
        """Plan a forward; returns None if nothing is to be done in it.

        Args:
            spans: in the batch's order, each job and its sequence positions in the forward.
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
        """Give each job of a forward its rows, once the forward has been launched.

        Args:
            step: the forward.
            failure: why its rows could not be read; None if they could.
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
        """Return the actions that a forward's probe scores require before its next tokens are chosen, by job.

        Args:
            step: the forward, whose scores have been computed.
            token_ids: returns all token ids of the forward.
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
                job.scores.failure = error  # reported to the replica when it fetches the scores
                continue
            if action is not None:
                found[job.request.job_id] = action
        return found

    def request(self, job_id: str) -> CaptureRequest:
        """Return a job's capture request."""
        return self._jobs[job_id].request

    def take(self, job_id: str, tokens: Sequence[int]) -> CapturedRows:
        """Return a finished job's rows and drop the job.

        Args:
            job_id: the job.
            tokens: the tokens that must have a row: all but the last one.

        Raises:
            LostRowsError: if rows are missing.
            UncapturableError: if a hook point has no row per token.
        """
        self.resumed(job_id)
        job, n_rows = self._jobs.pop(job_id, None), len(tokens)
        if job is None or job.rows is None or job.request.capture is None:
            raise LostRowsError("the worker has no rows of this request")
        if job.lost is not None:
            raise LostRowsError(job.lost)
        if job.n_processed < n_rows:
            raise LostRowsError(f"{job.n_processed} tokens of this request were processed; {n_rows} were expected")
        try:
            rows = finalize_rows(job.rows.cut(), job.request.capture, job.n_prompt, n_rows)
        except RowsMissingError as error:
            raise LostRowsError(str(error)) from error
        if self._prefixes is not None and job.names:
            # The next turn of a conversation begins with this completion.
            job.names = name_blocks(job, tokens, self._prefixes.size, job.names)
            self._keep(job, n_rows)
        return rows

    def resumed(self, job_id: str) -> bool:
        """Take the rows of the prompt tokens that vLLM has found in its cache; returns whether all of them are here."""
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
            job.lost = f"the rows of {count} tokens that were found in the prefix cache have been dropped"
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
        """Cache rows of prompts that were read up to a step."""
        while self._to_keep and self._to_keep[0][0] <= step:
            _, job = self._to_keep.popleft()
            self._keep(job, min(job.n_processed, job.n_prompt))

    def _keep(self, job: _Job, until: int) -> None:
        """Cache rows of a job's blocks for other prompts."""
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
        """Return the scores since the last call, of those of these jobs that are here.

        For a job whose rows are lost, the scores contain the reason.
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
        """Return the same probe with weights that all requests share, so that one product scores the rows of all requests."""
        linear_probe = scorer.linear_probe
        parts = (linear_probe.weight, linear_probe.bias, linear_probe.mean, linear_probe.scale)
        digest = blake2b(b"".join(part.cpu().numpy().tobytes() for part in parts), digest_size=16).digest()
        if digest not in self._linear_probes:
            while len(self._linear_probes) >= MAX_PROBES:
                del self._linear_probes[next(iter(self._linear_probes))]
            self._linear_probes[digest] = linear_probe.to(self._device)
        return replace(scorer, linear_probe=self._linear_probes[digest])

    def forget(self, job_id: str) -> None:
        """Drop a job and its rows."""
        self._jobs.pop(job_id, None)


def _new(job: _Job | None, span: range) -> range:
    """Return the part of a span that is new, and count its tokens as processed."""
    if job is None:
        return span
    if span.start > job.n_processed and job.n_processed:
        job.lost = job.lost or f"tokens {job.n_processed}–{span.start - 1} were not processed by the model"
    elif span.start > job.n_processed:
        job.found = job.n_processed = span.start
    new = range(min(max(span.start, job.n_processed), span.stop), span.stop)
    job.n_processed = max(job.n_processed, span.stop)
    return new
