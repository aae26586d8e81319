"""The rows of the requests in one vLLM worker: cut from every step's whole batch, held until the replica says what was said.

Three things are unlike an engine that runs the model itself, and are settled here:

- vLLM packs its batch and hands out a strip of tokens, with no padding.
- A request may be preempted: its rows so far are kept, and when vLLM computes them again, only what is new counts.
- A request may overrun. Where its end is decided in another process (a stop string, or a step that was scheduled before the
  last one's token was known), rows come that belong to no token of the completion. So what depends on where the end is (the
  last row, the mean of all generated ones) is decided when the end is known, and rows behind it are dropped.

A request whose rows are not exactly those of its prompt and all but the last token of its completion fails (`LostRowsError`).
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from hashlib import blake2b

import numpy as np
import torch

from roentgen.contract import Positions
from roentgen.linear_probe import Readout
from roentgen.store import StoreError
from serve_app.capture.grid import Strip
from serve_app.capture.memory import RowMemory
from serve_app.capture.rows import CapturedRows, CapturePlan, RequestRows, StepRows
from serve_app.capture.scoring import NewScores, RequestScores, Scorer, StepScores, UnscorableError
from serve_app.capture.steering import StepSteering
from serve_app.engines.vllm.orders import Order

log = logging.getLogger(__name__)

MAX_READOUTS = 256
"""Probes whose numbers are kept on the model's device."""


class LostRowsError(StoreError):
    """Rows of a request are not there, so what it asked for cannot be kept."""


def collecting_plan(plan: CapturePlan, n_prompt: int) -> CapturePlan:
    """Return what to collect for a plan while it is not known where the completion ends.

    Args:
        plan: what is to be kept in the end.
        n_prompt: tokens in the prompt.
    """
    match plan.positions.policy:
        case "last":
            return replace(plan, positions=Positions("all"), dtype="model", first=max(plan.first, n_prompt - 1))
        case "mean_generated":
            return replace(plan, positions=Positions("generated"), dtype="model")
        case _:
            return plan


def settled(rows: CapturedRows, plan: CapturePlan, n_prompt: int, n_rows: int) -> CapturedRows:
    """Return what a plan keeps of what `collecting_plan` collected, once the end is known.

    Args:
        rows: collected, perhaps beyond the end.
        plan: what is to be kept.
        n_prompt: tokens in the prompt.
        n_rows: of a full capture.

    Raises:
        LostRowsError: if there are others than there should be.
    """
    wanted = plan.kept(n_prompt, 0, n_rows)
    if plan.positions.policy == "mean_prompt":
        _check(rows, [-1] * bool(wanted))
        return rows
    inside = np.isin(rows.position, np.arange(n_rows))
    if plan.positions.policy == "last":
        inside &= rows.position == n_rows - 1
    if not inside.all():
        kept = torch.from_numpy(np.flatnonzero(inside))
        rows = CapturedRows({key: values[kept] for key, values in rows.tensors.items()}, rows.position[inside])
    _check(rows, list(wanted))
    tensors = rows.tensors
    if plan.positions.policy == "mean_generated":
        kept_as = {key: values.dtype if plan.dtype == "model" else torch.float32 for key, values in tensors.items()}
        tensors = {
            key: values.float().mean(0, keepdim=True).to(kept_as[key]) if len(values) else values
            for key, values in tensors.items()
        }
        rows = replace(rows, position=np.full(min(len(wanted), 1), -1, dtype=np.int32))
    if plan.dtype != "model":
        tensors = {key: values.to(getattr(torch, plan.dtype)) for key, values in tensors.items()}
    return replace(rows, tensors=tensors)


def _check(rows: CapturedRows, wanted: list[int]) -> None:
    if rows.position.tolist() != wanted:
        raise LostRowsError(f"{len(rows.position)} rows were captured, not the {len(wanted)} that there should be")


@dataclass
class _Job:
    """One request: what it ordered, how many of its tokens have passed, and its rows so far."""

    order: Order
    n_prompt: int
    rows: RequestRows | None
    scores: RequestScores | None
    fed: int = 0
    lost: str | None = None


@dataclass(frozen=True)
class Step:
    """One forward's visitors: what adds to the batch, then what reads it."""

    steering: StepSteering | None
    rows: StepRows | None
    scores: StepScores | None
    jobs: list[_Job] = field(repr=False)


class Collector:
    """The rows of one worker's requests."""

    def __init__(self, device: torch.device) -> None:
        """Begin without requests.

        Args:
            device: the model's.
        """
        self._jobs: dict[str, _Job] = {}
        self._memory = RowMemory()
        self._device = device
        self._readouts: dict[bytes, Readout] = {}

    @property
    def held(self) -> int:
        """Jobs whose rows are here."""
        return len(self._jobs)

    def begin(self, order: Order, n_prompt: int) -> None:
        """Take a request that has been admitted; one that is known already has been preempted and comes back."""
        if order.job_id in self._jobs:
            return
        plan = order.capture
        rows = RequestRows(collecting_plan(plan, n_prompt), n_prompt, self._memory) if plan is not None else None
        scores = RequestScores(tuple(self._shared(scorer) for scorer in order.probes)) if order.probes else None
        self._jobs[order.job_id] = _Job(order, n_prompt, rows, scores)

    def step(self, spans: list[tuple[str | None, range]]) -> Step | None:
        """Lay out a forward; None if nothing is to be done in it.

        Args:
            spans: in the batch's order, the job and the sequence positions that it holds.
        """
        jobs = [self._jobs.get(job_id) if job_id is not None else None for job_id, _ in spans]
        known = [job for job in jobs if job is not None]
        if not known:
            return None
        lengths = [len(span) for _, span in spans]
        steered = [job.order.steering if job is not None else () for job in jobs]
        steering = None
        if any(steered):
            prompts = [job.n_prompt if job is not None else 0 for job in jobs]
            steering = StepSteering(steered, prompts, Strip([span for _, span in spans]))
        new = [_new(job, span) for job, (_, span) in zip(jobs, spans, strict=True)]
        capturing = [job for job in known if job.rows is not None]
        rows = None
        if capturing:
            rows = StepRows([job.rows if job is not None else None for job in jobs], Strip(new, lengths), self._memory)
        scores = None
        if any(job.scores is not None for job in known):
            scores = StepScores([job.scores if job is not None else None for job in jobs], Strip(new, lengths))
        return Step(steering, rows, scores, known)

    def done(self, step: Step, failure: Exception | None) -> None:
        """Give each job of a forward its rows, once it has been issued.

        Args:
            step: the forward.
            failure: why its rows could not be read, if so.
        """
        if failure is not None:
            for job in step.jobs:
                job.lost = job.lost or f"{type(failure).__name__}: {failure}"
            return
        if step.rows is not None:
            step.rows.deliver()
        if step.scores is not None:
            step.scores.deliver(wait=False)

    def take(self, job_id: str, n_rows: int) -> CapturedRows:
        """Return a finished job's rows and forget it.

        Args:
            job_id: which.
            n_rows: of a full capture.

        Raises:
            LostRowsError: if they are not all there.
            UncapturableError: if what it asked for has no row per token.
        """
        job = self._jobs.pop(job_id, None)
        if job is None or job.rows is None or job.order.capture is None:
            raise LostRowsError("the worker has no rows of this request")
        if job.lost is not None:
            raise LostRowsError(job.lost)
        if job.fed < n_rows:
            raise LostRowsError(f"{job.fed} tokens of this request passed through the model, not {n_rows}")
        return settled(job.rows.cut(), job.order.capture, job.n_prompt, n_rows)

    def scores(self, job_ids: Iterable[str]) -> dict[str, NewScores]:
        """Return the scores that have come since the last time, of those of these jobs that are here.

        A job whose rows are lost has the reason among its scores.
        """
        found = {}
        for job_id in job_ids:
            job = self._jobs.get(job_id)
            if job is not None and job.scores is not None:
                if job.lost is not None:
                    job.scores.failure = UnscorableError(job.lost)
                found[job_id] = job.scores.drain()
        return found

    def _shared(self, scorer: Scorer) -> Scorer:
        """Return the same probe with the one copy of its numbers that all requests share: then one product scores them all."""
        readout = scorer.readout
        parts = (readout.weight, readout.bias, readout.mean, readout.scale)
        digest = blake2b(b"".join(part.cpu().numpy().tobytes() for part in parts), digest_size=16).digest()
        if digest not in self._readouts:
            while len(self._readouts) >= MAX_READOUTS:
                del self._readouts[next(iter(self._readouts))]
            self._readouts[digest] = readout.to(self._device)
        return replace(scorer, readout=self._readouts[digest])

    def forget(self, job_id: str) -> None:
        """Drop a job's rows."""
        self._jobs.pop(job_id, None)


def _new(job: _Job | None, span: range) -> range:
    """Return the end of a span that has not been there before, and count it as passed."""
    if job is None:
        return span
    if span.start > job.fed:
        job.lost = job.lost or f"tokens {job.fed}–{span.start - 1} did not pass through the model"
    new = range(min(max(span.start, job.fed), span.stop), span.stop)
    job.fed = max(job.fed, span.stop)
    return new
