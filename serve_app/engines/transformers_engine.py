"""The engine that runs everywhere: a continuous batch of requests through the nnsight-wrapped transformers model.

One thread owns the model, because nnsight has one interleaver per model and no lock. Between any two steps it

1. admits requests that have arrived, as far as memory allows (`admission`), and prefills them together in a forward of their
   own. A prefill is bounded; a prompt longer than the bound is read in pieces, with a step of the running ones between
   each two, so that nobody waits long;
2. decodes one token for every running request, in one forward over keys and values that stay where they are (`kv_cache`);
3. lets finished and cancelled requests go: their slots are free at once, and their activations are cut and handed on while
   the others go on.

Every forward runs through `ObservedModel.run`, with what its requests want to capture of it. A failed prefill fails the
requests in it, a failed step all that run; the engine goes on with the others. After several failures in a row (a broken
GPU answers nothing else) it gives up, and the replica is restarted.

A model whose cache cannot be joined runs in static batches, and the engine says so when it starts.

Batch-invariant, nothing of a request depends on what runs beside it, to the last bit: each prompt is read alone in pieces of
one size, steps compute rows in fixed shapes (`invariance`), and tokens are chosen row by row. A model that cannot is run one
request at a time.
"""

import logging
import math
import threading
import time
from collections import Counter, deque
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache

from serve_app.capture.grid import Grid
from serve_app.capture.memory import RowMemory
from serve_app.capture.rows import StepRows
from serve_app.capture.scoring import StepScores, UnscorableError
from serve_app.capture.steering import OversteeredError, StepSteering
from serve_app.engines.admission import Budget, next_jobs
from serve_app.engines.invariance import PIECE, FixedShapes, settle
from serve_app.engines.kv_cache import BatchRows, SlotRows, StaticRows, continuous
from serve_app.engines.protocol import EngineBusyError, EngineStoppedError, Failed, GenerationJob, Load, TokenScore
from serve_app.engines.running import Prefill, Running
from serve_app.engines.sampling import choose, score
from serve_app.models import LoadedModel

log = logging.getLogger(__name__)

GATHER_S = 0.02
"""How long an idle engine waits for company after a first request: requests sent together should run together."""

PREFILL_TOKENS = {"cpu": 512, "cuda": 8192}
"""Tokens of one prefill: enough to fill the device, and few enough for the running requests to wait for."""

LOGITS_BYTES = 256 << 20
"""Logits of one prefill that needs them at every position; beyond, it is read in more pieces."""

MAX_FAILURES = 3
"""Failures in a row after which the engine gives up."""


class TransformersEngine:
    """Generates with a transformers model, in a continuous batch (see the module)."""

    name = "transformers"
    scores_rows = True

    def __init__(
        self,
        model: LoadedModel,
        *,
        max_batch: int = 32,
        max_queue: int = 256,
        max_prefill_tokens: int = 0,
        max_cache_tokens: int = 0,
        batch_invariant: bool = False,
    ) -> None:
        """Measure the memory and start the engine's thread.

        Args:
            model: the model; this engine's thread is the only one to run it from now on.
            max_batch: requests generated together.
            max_queue: requests waiting for that.
            max_prefill_tokens: the most that one prefill takes, padding included; 0 for what suits the device.
            max_cache_tokens: size of the KV cache, 0 for what the free memory allows.
            batch_invariant: whether a request's tokens, scores and rows must not depend on what runs beside it.
        """
        self._model = model
        self.batch_invariant = batch_invariant
        self._shapes, reason = settle(model, max_batch) if batch_invariant else (None, "")
        self._together = 1 if reason else max_batch
        if reason:
            log.warning("%s runs one request at a time to be batch-invariant: %s", model.source.name, reason)
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._max_prefill_tokens = max_prefill_tokens or PREFILL_TOKENS[model.device.type]
        self._continuous = continuous(model.observed.config)
        if not self._continuous:
            log.warning("%s has a cache that rows cannot join: requests run in static batches", model.source.name)
        self.budget = Budget.measure(model, max_cache_tokens)
        log.info("room for %d tokens in the KV cache", self.budget.cache_tokens)
        self._memory = RowMemory()
        self._running: list[Running] = []
        self._steps: Counter[int] = Counter()
        self._prefill: Prefill | None = None
        self._rows: BatchRows = self._empty()
        self._changed = threading.Condition()
        self._waiting: deque[GenerationJob] = deque()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    @property
    def load(self) -> Load:
        """What it has to do now, and has done."""
        prefill = self._prefill
        running = len(self._running) + (len(prefill.running) if prefill else 0)
        return Load(running, len(self._waiting), dict(self._steps))

    @property
    def capacity(self) -> int:
        """The most tokens that one sequence may have."""
        return self.budget.cache_tokens

    def submit(self, job: GenerationJob) -> None:
        """Queue a job.

        Raises:
            RequestTooLargeError: if it can never fit.
            EngineBusyError: if the queue is full.
            EngineStoppedError: if the engine is closed.
        """
        self.budget.check(job)
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

    def _empty(self) -> BatchRows:
        return SlotRows() if self._continuous else StaticRows(self._model.observed.config)

    def _run(self) -> None:
        failures = 0
        while self._wait_for_jobs():
            try:
                with torch.inference_mode():
                    while not self._closed and self._turn():
                        failures = 0
            except Exception as error:
                log.exception("a forward failed")
                failures += 1
                self._fail_all(error)
                if failures == MAX_FAILURES:
                    log.critical("%d failures in a row: the engine gives up", failures)
                    with self._changed:
                        self._closed = True
            self._rows = self._empty()  # nothing runs: give the memory back
        self._fail_all(EngineStoppedError("the engine was closed"))
        with self._changed:
            waiting, self._waiting = self._waiting, deque()
        for job in waiting:
            job.listener(Failed(EngineStoppedError("the engine was closed")))

    def _wait_for_jobs(self) -> bool:
        """Wait until there is something to do, and a moment longer for company; False when the engine is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting)
        if not self._closed:
            time.sleep(GATHER_S)
        return not self._closed

    def _turn(self) -> bool:
        """Read a piece of waiting prompts and decode one token for all that run; False if there was nothing to do."""
        if self._prefill is None and (self._continuous or not self._running):
            self._prefill = self._admit()
        prefill = self._prefill
        if prefill is not None:
            self._read(prefill)
        if self._running:
            self._decode()
        return prefill is not None or bool(self._running)

    def _fail_all(self, error: Exception) -> None:
        """Tell all jobs that run or are being read that they could not be finished."""
        for running in [*self._running, *(self._prefill.running if self._prefill else [])]:
            running.job.listener(Failed(error))
        self._running, self._prefill = [], None

    def _admit(self) -> Prefill | None:
        """Take waiting jobs, as many as fit, and lay out their prompts."""
        with self._changed:
            self._waiting = deque(job for job in self._waiting if not job.cancelled.is_set())
            jobs = next_jobs(
                self._waiting,
                [running.job for running in self._running],
                self.budget,
                self._together,
                1 if self.batch_invariant else self._max_prefill_tokens,  # 1: a prompt is read alone
            )
        if not jobs:
            return None
        if self._together == 1:
            self._rows = self._empty()  # so that the memory it computes on lies as if nothing had run before
        return Prefill.lay_out([Running.start(job, self._model, self._memory) for job in jobs], self._rows.new())

    def _piece(self, prefill: Prefill) -> int:
        """Return how many columns of a prefill to read at once; a static batch's cache takes only a whole prompt."""
        if not self._continuous:
            return prefill.tokens.shape[1]
        if self.batch_invariant:
            return PIECE
        limit = self._max_prefill_tokens
        if prefill.all_logits:
            limit = min(limit, LOGITS_BYTES // (4 * self._model.observed.config.get_text_config().vocab_size))
        return max(1, limit // len(prefill.running))

    def _read(self, prefill: Prefill) -> None:
        """Read the next piece of a prefill; after the last, its jobs have their first token and join the running ones.

        If the forward fails, the new jobs fail with it; the running ones have a cache of their own and go on.
        """
        start, stop = prefill.done, min(prefill.done + self._piece(prefill), prefill.tokens.shape[1])
        padding = torch.tensor(prefill.padding)[:, None]
        columns = torch.arange(stop)
        mask, positions = (columns >= padding).long(), (columns - padding).clamp(min=0)
        try:
            logits = self._forward(
                prefill.running,
                prefill.tokens[:, start:stop],
                mask,
                positions[:, start:],
                prefill.cache,
                logits_to_keep=0 if prefill.all_logits else 1,
            )
        except Exception as error:
            if not self._running:
                raise
            log.exception("a prefill of %d requests failed", len(prefill.running))
            self._prefill = None
            for running in prefill.running:
                running.job.listener(Failed(error))
            return
        if prefill.all_logits:
            prefill.score(logits)
        prefill.done = stop
        if stop < prefill.tokens.shape[1]:
            if all(running.job.cancelled.is_set() for running in prefill.running):
                self._prefill = None
            return
        staying = self._advance(prefill.running, logits[:, -1])
        self._prefill = None
        if staying:
            self._running += [prefill.running[row] for row in staying]
            self._rows.add(prefill.cache, staying, prefill.padding)

    def _decode(self) -> None:
        """Decode one token for every running job."""
        self._steps[len(self._running)] += 1
        tokens = torch.tensor([[running.token_ids[-1]] for running in self._running])
        mask, positions = self._rows.step_inputs()
        shapes = self._shapes.step(mask) if self._shapes is not None else None
        logits = self._forward(self._running, tokens, mask, positions, self._rows.cache, 1, shapes)
        self._rows.stepped()
        staying = self._advance(self._running, logits[:, -1])
        if len(staying) < len(self._running):
            self._running = [self._running[row] for row in self._rows.keep(staying)]

    def _forward(
        self,
        running: list[Running],
        tokens: Int[Tensor, "batch width"],
        mask: Int[Tensor, "batch context"],
        positions: Int[Tensor, "batch width"],
        cache: Cache,
        logits_to_keep: int,
        shapes: FixedShapes | None = None,
    ) -> Float[Tensor, "batch kept vocab"]:
        """Run the model on new tokens, steered, captured and scored as is asked; `logits_to_keep` 0 is all."""
        device = self._model.device
        grid = Grid.of(mask[:, -tokens.shape[1] :], positions)
        steering = StepSteering(
            [one.job.steering for one in running], [len(one.job.prompt_ids) for one in running], grid
        )
        rows = StepRows([one.rows for one in running], grid, self._memory)
        scores = StepScores([one.probed for one in running], grid)
        module = self._model.observed._module

        def forward() -> Any:
            with shapes or nullcontext():
                return module(
                    input_ids=tokens.to(device),
                    attention_mask=mask.to(device),
                    position_ids=positions.to(device),
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=logits_to_keep,
                )

        output = self._model.observed.run((steering, rows, scores), forward)
        rows.deliver()
        scores.deliver()
        logits: Tensor = output.logits
        return logits

    def _advance(self, running: list[Running], logits: Float[Tensor, "batch vocab"]) -> list[int]:
        """Choose the next tokens, report them and the jobs that have ended; returns the rows that go on."""
        logits = logits.float()
        samplers, top = [one.sampler for one in running], [one.job.sampling.top_logprobs for one in running]
        # Row by row, a row's shape is its own.
        height = 1 if self.batch_invariant else len(running)
        chosen: list[int] = []
        scores: list[TokenScore] = []
        for start in range(0, len(running), height):
            rows = slice(start, start + height)
            chosen += choose(logits[rows], samplers[rows])
            scores += score(logits[rows], chosen[rows], top[rows])
        staying = []
        for row, one in enumerate(running):
            if one.job.cancelled.is_set():
                continue
            if one.job.steering and math.isnan(scores[row].logprob):
                one.job.listener(Failed(OversteeredError()))
                continue
            reason = one.advance(chosen[row], scores[row]) if one.job.sampling.max_tokens else "length"
            if one.sampler.failure is not None:
                one.job.listener(Failed(one.sampler.failure))
                continue
            try:
                delta = one.news(final=reason is not None) if one.job.stream else None
            except UnscorableError as error:
                one.job.listener(Failed(error))
                continue
            if delta is not None:
                one.job.listener(delta)
            if reason is None:
                staying.append(row)
            else:
                one.finish(reason)
        return staying
