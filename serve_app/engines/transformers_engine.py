"""The engine that runs everywhere: batches of requests through the nnsight-wrapped transformers model.

One thread owns the model, because nnsight has one interleaver per model and no lock. It takes the requests that have
arrived, prefills them together (padded on the left, one forward), then decodes them together, one token per request and
step, against one KV cache. A request that finishes leaves the batch at once: its rows of the cache are dropped, so it costs
nothing more, and its activations are cut and handed on while the others go on. Requests that arrive meanwhile wait for
the batch to end.

Every forward runs through `ObservedModel.run`, with the union of what the batch's requests ask to capture.
"""

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from serve_app.capture.observer import taps_union
from serve_app.capture.rows import RequestRows, StepRows
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
        """Drop all other rows."""
        index = torch.tensor(rows, dtype=torch.long, device=self.tokens.device)
        self.running = [self.running[row] for row in rows]
        self.cache.batch_select_indices(index)
        self.tokens, self.mask = self.tokens[index], self.mask[index]


class TransformersEngine:
    """Generates with a transformers model, a batch at a time (see the module)."""

    def __init__(self, model: LoadedModel, *, max_batch: int = 32, max_queue: int = 256) -> None:
        """Start the engine's thread.

        Args:
            model: the model; this engine's thread is the only one to run it from now on.
            max_batch: requests generated together.
            max_queue: requests waiting for that.
        """
        self._model = model
        self._max_batch = max_batch
        self._max_queue = max_queue
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
        while jobs := self._next_jobs():
            batch: _Batch | None = None
            try:
                with torch.inference_mode():
                    batch = self._prefill(jobs)
                    while batch.running and not self._closed:
                        self._step(batch)
            except Exception as error:
                log.exception("a batch of %d failed", len(jobs))
                for job in [running.job for running in batch.running] if batch else jobs:
                    job.listener(Failed(error))
                continue
            for running in batch.running:  # closed in the middle
                running.job.listener(Failed(EngineStoppedError("the engine was closed")))
        for job in self._waiting:
            job.listener(Failed(EngineStoppedError("the engine was closed")))

    def _next_jobs(self) -> list[GenerationJob]:
        """Wait for jobs and take a batch of them; empty when the engine is closed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
            time.sleep(GATHER_S)
            with self._changed:
                if self._closed:
                    return []
                waiting = [job for job in self._waiting if not job.cancelled.is_set()]
                self._waiting = deque(waiting[self._max_batch :])
                if waiting:
                    return waiting[: self._max_batch]

    def _prefill(self, jobs: list[GenerationJob]) -> _Batch:
        """Run all prompts in one forward and choose each job's first token."""
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
        batch = _Batch(running, cache, tokens.to(model.device), mask.to(model.device))
        self._advance(batch, self._forward(batch))
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
        """Cut a job's rows and report its result; what goes wrong here fails this job alone."""
        try:
            captured = running.rows.cut(len(running.job.prompt_ids)) if running.rows else None
        except RuntimeError as error:
            running.job.listener(Failed(error))
            return
        result = Finished(running.text.text, running.token_ids, running.logprobs, reason, captured)
        running.job.listener(result)
