"""The engine that runs everywhere: a continuous batch of requests through the nnsight-wrapped transformers model.

One thread owns the model, because nnsight has one interleaver per model and no lock. Between any two steps it

1. admits requests that have arrived: they are prefilled together, in one forward of their own that is bounded, so that
   the running ones never wait long, and their KV cache is joined to the running one;
2. decodes one token for every running request, in one forward;
3. lets finished and cancelled requests go: their rows of the cache are dropped, so they cost nothing more, and their
   activations are cut and handed on while the others go on.

Rows are padded on the left, so that all of them end at the same column and a step appends one column to all. Every
forward runs through `ObservedModel.run`, with the union of what its requests ask to capture.

A sliding-window cache holds the last columns of each row only, so rows of different ages cannot be joined in it: models
that have one run in static batches, and the engine says so when it starts.
"""

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from serve_app.capture.observer import taps_union
from serve_app.capture.rows import RequestRows, StepRows, UncapturableError
from serve_app.engines.protocol import (
    EngineBusyError,
    EngineStoppedError,
    Failed,
    Finished,
    GenerationJob,
    TextDelta,
)
from serve_app.engines.sampling import Sampler, token_logprobs
from serve_app.engines.text import TextStream
from serve_app.models import LoadedModel

log = logging.getLogger(__name__)

GATHER_S = 0.02
"""How long an idle engine waits for company after a first request: requests sent together should run together."""


@dataclass
class _Running:
    """A job in the batch, and what it has so far."""

    job: GenerationJob
    sampler: Sampler
    text: TextStream
    rows: RequestRows | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def finish_reason(self, eos_token_ids: frozenset[int]) -> str | None:
        """Return why it has ended, None if it goes on."""
        if self.text.stopped or self.token_ids[-1] in eos_token_ids:
            return "stop"
        return "length" if len(self.token_ids) >= self.job.sampling.max_tokens else None


@dataclass
class _Batch:
    """The running jobs and their place in the model: row i of every tensor is job i."""

    running: list[_Running]
    cache: DynamicCache
    tokens: Int[Tensor, "batch width"]
    mask: Int[Tensor, "batch context"]

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows, and the columns that only they had."""
        index = torch.tensor(rows, dtype=torch.long, device=self.tokens.device)
        self.running = [self.running[row] for row in rows]
        self.cache.batch_select_indices(index)
        self.tokens, self.mask = self.tokens[index], self.mask[index]
        padding = int(self.mask.any(0).int().argmax()) if rows else 0
        if padding and joinable(self.cache):
            self.mask = self.mask[:, padding:]
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, padding:], layer.values[:, :, padding:]

    def join(self, other: "_Batch") -> None:
        """Add another batch's jobs: pad the shorter context on the left, then put one under the other."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        self.running = self.running + other.running
        self.tokens = torch.cat([self.tokens, other.tokens])
        self.mask = torch.cat([pad(batch.mask, (width - batch.mask.shape[1], 0)) for batch in (self, other)])
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            mine.keys, mine.values = (
                torch.cat([pad(part, (0, 0, width - part.shape[2], 0)) for part in parts])
                for parts in ((mine.keys, theirs.keys), (mine.values, theirs.values))
            )


def joinable(cache: DynamicCache) -> bool:
    """Whether rows of different ages fit into one cache: every layer keeps every column."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


class TransformersEngine:
    """Generates with a transformers model, in a continuous batch (see the module)."""

    def __init__(
        self, model: LoadedModel, *, max_batch: int = 32, max_queue: int = 256, max_prefill_tokens: int = 2048
    ) -> None:
        """Start the engine's thread.

        Args:
            model: the model; this engine's thread is the only one to run it from now on.
            max_batch: requests generated together.
            max_queue: requests waiting for that.
            max_prefill_tokens: the most that one prefill takes, padding included; a longer prompt is prefilled alone.
        """
        self._model = model
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._max_prefill_tokens = max_prefill_tokens
        self._continuous = joinable(DynamicCache(config=model.observed.config))
        if not self._continuous:
            log.warning("%s has a sliding-window cache: requests run in static batches", model.source.name)
        self._changed = threading.Condition()
        self._waiting: deque[GenerationJob] = deque()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    def submit(self, job: GenerationJob) -> None:
        """Queue a job.

        Raises:
            EngineBusyError: if the queue is full.
            EngineStoppedError: if the engine is closed.
        """
        with self._changed:
            if self._closed:
                raise EngineStoppedError("the engine is closed")
            if len(self._waiting) >= self._max_queue + self._max_batch:
                raise EngineBusyError(f"{len(self._waiting)} requests are waiting already")
            self._waiting.append(job)
            self._changed.notify_all()

    def close(self) -> None:
        """Stop after the current step; jobs that have not finished fail."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while self._wait_for_jobs():
            batch: _Batch | None = None
            try:
                with torch.inference_mode():
                    while not self._closed:
                        if batch is None or self._continuous:
                            jobs = self._admit(len(batch.running) if batch else 0)
                            batch = self._prefill(jobs, batch) if jobs else batch
                        if batch is None or not batch.running:
                            break
                        self._step(batch)
            except Exception as error:
                log.exception("a step failed")
                _fail(batch.running if batch else [], error)
                continue
            _fail(batch.running if batch else [], EngineStoppedError("the engine was closed"))  # closed in the middle
        for job in self._waiting:
            job.listener(Failed(EngineStoppedError("the engine was closed")))

    def _wait_for_jobs(self) -> bool:
        """Wait until there is something to do, and a moment longer for company; False when the engine is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting)
        time.sleep(GATHER_S)
        return not self._closed

    def _admit(self, running: int) -> list[GenerationJob]:
        """Take waiting jobs, in order, as many as fit into the batch and into one prefill."""
        with self._changed:
            waiting = deque(job for job in self._waiting if not job.cancelled.is_set())
            jobs: list[GenerationJob] = []
            longest = 0
            while waiting and running + len(jobs) < self._max_batch:
                longest = max(longest, len(waiting[0].prompt_ids))
                if jobs and longest * (len(jobs) + 1) > self._max_prefill_tokens:
                    break
                jobs.append(waiting.popleft())
            self._waiting = waiting
            return jobs

    def _prefill(self, jobs: list[GenerationJob], batch: _Batch | None) -> _Batch | None:
        """Run new jobs' prompts in one forward, choose their first tokens, and join them to the running batch.

        If the forward fails, the new jobs fail with it; the running ones have a cache of their own and go on.
        """
        model = self._model
        tokenizer = model.tokenizer.backend_tokenizer
        running = [
            _Running(
                job,
                Sampler(job.sampling),
                TextStream(tokenizer, job.sampling.stop),
                RequestRows(job.capture) if job.capture else None,
            )
            for job in jobs
        ]
        width = max(len(job.prompt_ids) for job in jobs)
        tokens = torch.zeros(len(jobs), width, dtype=torch.long)
        mask = torch.zeros(len(jobs), width, dtype=torch.long)
        for row, job in enumerate(jobs):
            tokens[row, width - len(job.prompt_ids) :] = torch.tensor(job.prompt_ids)
            mask[row, width - len(job.prompt_ids) :] = 1
        cache = DynamicCache(config=model.observed.config)
        new = _Batch(running, cache, tokens.to(model.device), mask.to(model.device))
        try:
            self._advance(new, self._forward(new))
        except Exception as error:
            log.exception("a prefill of %d requests failed", len(new.running))
            _fail(new.running, error)
            return batch
        if batch is None or not batch.running:
            return new
        if new.running:
            batch.join(new)
        return batch

    def _step(self, batch: _Batch) -> None:
        """Decode one token for every job."""
        batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(batch.running), 1)], dim=1)
        self._advance(batch, self._forward(batch))

    def _forward(self, batch: _Batch) -> Float[Tensor, "batch vocab"]:
        """Run the model on the batch's new tokens, capture what is asked, and return each row's last logits."""
        width = batch.tokens.shape[1]
        positions = (batch.mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
        lengths = batch.mask[:, -width:].sum(1).tolist()
        sink = StepRows([running.rows for running in batch.running], lengths, width, self._model.device)
        taps = taps_union([running.rows.plan.taps for running in batch.running if running.rows])
        module = self._model.observed._module
        output = self._model.observed.run(
            taps,
            sink,
            lambda: module(
                input_ids=batch.tokens,
                attention_mask=batch.mask,
                position_ids=positions,
                past_key_values=batch.cache,
                use_cache=True,
                logits_to_keep=1,
            ),
        )
        sink.deliver()
        logits: Tensor = output.logits[:, -1]
        return logits

    def _advance(self, batch: _Batch, logits: Float[Tensor, "batch vocab"]) -> None:
        """Choose the next tokens, report them, and drop the jobs that have ended."""
        chosen = [running.sampler.choose(row) for running, row in zip(batch.running, logits, strict=True)]
        logprobs = token_logprobs(logits, chosen)
        staying = []
        for row, running in enumerate(batch.running):
            if running.job.cancelled.is_set():
                continue
            running.token_ids.append(chosen[row])
            running.logprobs.append(logprobs[row])
            running.text.push(chosen[row])
            reason = running.finish_reason(self._model.eos_token_ids)
            if running.job.stream and (delta := running.text.take(final=reason is not None)):
                running.job.listener(TextDelta(delta))
            if reason is None:
                staying.append(row)
            else:
                self._finish(running, reason)
        batch.tokens = torch.tensor(chosen, device=self._model.device)[:, None]
        if len(staying) < len(batch.running):
            batch.keep(staying)

    def _finish(self, running: _Running, reason: str) -> None:
        """Cut a job's rows and report its result; what it should not have asked for fails it alone."""
        try:
            captured = running.rows.cut(len(running.job.prompt_ids)) if running.rows else None
        except UncapturableError as error:
            running.job.listener(Failed(error))
            return
        running.job.listener(Finished(running.text.text, running.token_ids, running.logprobs, reason, captured))


def _fail(jobs: list[_Running], error: Exception) -> None:
    """Tell jobs that they could not be finished."""
    for running in jobs:
        running.job.listener(Failed(error))
