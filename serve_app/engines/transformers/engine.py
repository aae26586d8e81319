"""The engine that runs everywhere: it batches requests continuously through the nnsight-wrapped transformers model.

One thread owns the model, because nnsight has one interleaver per model and no lock. Between two steps the thread

1. admits waiting requests, as far as memory allows (`admission`), and prefills them together in a forward of their own. A
   prefill is bounded: a prompt longer than the bound is read in pieces, with a decoding step of the running requests between
   two pieces, so no request waits long;
2. decodes one token for every running request, in one forward over keys and values that stay in place (`kv_cache`);
3. removes finished and cancelled requests. Their slots are free at once, and their activations are passed on while the others
   continue.

Every forward runs through `Forwards`, with what its requests capture. If a forward fails, each of its requests is tried alone:
those that fail alone have failed, and the others continue. If several times in a row no request succeeds, and a token that
belongs to no request fails too (as on a broken GPU), the engine stops and the replica is restarted.

A model whose cache requests cannot join runs in static batches, and the engine logs so when it starts. A model whose cache the
engine cannot keep is rejected at the start (`model_cache`).

In batch-invariant mode, no bit of a request's results depends on the other requests. Each prompt is read alone, in pieces of
one size; steps compute rows in fixed shapes (`invariance`); and tokens are chosen row by row. A model that does not support
this runs one request at a time.
"""

import logging
import threading
import time
from collections import Counter, deque
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from serve_app.capture.probe_scores import UnscorableError
from serve_app.capture.row_memory import RowMemory
from serve_app.engines.completion import no_token
from serve_app.engines.memory_budget import free_host_memory
from serve_app.engines.probe_stopping import Action
from serve_app.engines.protocol import (
    EngineBusyError,
    EngineStoppedError,
    Failed,
    FinishReason,
    GenerationJob,
    Load,
    PrefixCaching,
    Sampling,
    TokenScore,
    UnknownTokenError,
)
from serve_app.engines.transformers.admission import Budget, next_jobs
from serve_app.engines.transformers.compiled.manager import CompiledStepManager
from serve_app.engines.transformers.forwards import Forwards
from serve_app.engines.transformers.int8_weights import dequantize_weights
from serve_app.engines.transformers.invariance import PIECE, settle
from serve_app.engines.transformers.kv_cache import BatchRows, SlotRows, StaticRows
from serve_app.engines.transformers.loaded_model import LoadedModel
from serve_app.engines.transformers.model_cache import ForwardInputs, inspect_cache
from serve_app.engines.transformers.packed_weights import pack_weights, unpack_weights
from serve_app.engines.transformers.prefix_reuse import PrefixReuse
from serve_app.engines.transformers.running_job import Prefill, RunningJob
from serve_app.engines.transformers.sampling import Sampler, choose, score, score_named

log = logging.getLogger(__name__)

BATCHING_WINDOW_S = 0.02
"""Batching window in seconds for the first request of an idle engine: requests sent together should run together."""

PREFILL_TOKENS = {"cpu": 512, "cuda": 8192}
"""Prefill chunk size in tokens, per device: large enough to use the device well, and it bounds the latency of decoding."""

LOGITS_BYTES = 256 << 20
"""Largest size of one prefill's logits, if it needs them at every position; a larger prefill is read in more pieces."""

NO_SAMPLER = Sampler(Sampling(max_tokens=0, temperature=0), [], frozenset())
"""Sampler of a row whose token is not sampled: it draws no random numbers."""

MAX_DEAD_FORWARDS = 3
"""Consecutive failures, each with a model that no longer computes anything, after which the engine stops."""


class TransformersEngine:
    """Generates with a transformers model, in a continuous batch (see the module)."""

    name = "transformers"

    def __init__(
        self,
        model: LoadedModel,
        *,
        max_batch: int = 32,
        max_queue: int = 256,
        max_prefill_tokens: int = 0,
        max_cache_tokens: int = 0,
        batch_invariant: bool = False,
        prefix_cache: bool = True,
        eager: bool = False,
        compile_first: bool = False,
    ) -> None:
        """Measure the memory and start the engine's thread.

        Args:
            model: the model; from now on only this engine's thread runs it.
            max_batch: requests that run together.
            max_queue: requests that may wait.
            max_prefill_tokens: most tokens of one prefill, padding included; 0 for a default that suits the device.
            max_cache_tokens: size of the KV cache; 0 for what the free memory allows.
            batch_invariant: whether a request's tokens, scores and rows must not depend on other requests.
            prefix_cache: whether to reuse the common prefix of prompts.
            eager: whether decoding steps are never compiled.
            compile_first: whether to compile decoding steps before the engine starts.

        Raises:
            UnsupportedModelError: if the engine cannot keep the model's cache.
        """
        self._model = model
        self.batch_invariant = batch_invariant
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._max_prefill_tokens = max_prefill_tokens or PREFILL_TOKENS[model.device.type]
        self._cache_support = model.checks.cache_support or inspect_cache(model.observed._module, model.device)
        self._batching = model.batching
        self._joins = self._cache_support.continuous and model.batching.joins
        self._shapes, reason = settle(model, self._cache_support, max_batch) if batch_invariant else (None, "")
        self._max_together = max_batch
        if reason:
            self._max_together = 1
            log.warning("%s runs one request at a time to be batch-invariant: %s", model.source.name, reason)
        elif self._cache_support.alone or model.batching.kind == "alone":
            self._max_together = 1
            log.warning(
                "%s can continue one sequence at a time only: requests run one after another", model.source.name
            )
        elif not self._joins:
            log.warning("%s has a cache that requests cannot join: they run in static batches", model.source.name)
        if not batch_invariant:  # that mode multiplies plain weights, in shapes that were tested
            pack_weights(model.observed._module, free_host_memory())
        self.budget = Budget.measure(model, max_cache_tokens, max_batch=max_batch, cache_support=self._cache_support)
        log.info("the KV cache has room for %d tokens", self.budget.cache_tokens)
        self._memory = RowMemory()
        self._prefixes = PrefixReuse(
            model, self._cache_support, self._memory, asked=prefix_cache, batch_invariant=batch_invariant
        )
        if prefix_cache and not self.prefix_cache.enabled:
            log.warning("%s has no prefix cache: %s", model.source.name, self.prefix_cache.reason)
        disabled_by = "eager" if eager else "batch_invariant" if batch_invariant else ""
        self._compiled_steps = CompiledStepManager(model, disabled_by=disabled_by)
        if compile_first:
            self._compiled_steps.compile_first()
        self._forwards = Forwards(model, self._cache_support, self._memory, self._max_prefill_tokens)
        self._failures = 0
        self._retried_together = False
        self._running: list[RunningJob] = []
        self._steps: Counter[int] = Counter()
        self._prefill: Prefill | None = None
        self._restarting: deque[RunningJob] = deque()
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
    def prefix_cache(self) -> PrefixCaching:
        """Whether the prefixes of prompts are cached."""
        return self._prefixes.state

    @property
    def load(self) -> Load:
        """Its current load and its counters."""
        prefill = self._prefill
        running = len(self._running) + len(self._restarting) + (len(prefill.running) if prefill else 0)
        prefixes = self._prefixes
        return Load(running, len(self._waiting), dict(self._steps), prefixes.nbytes, prefixes.hits, prefixes.misses)

    @property
    def max_model_len(self) -> int:
        """The most tokens that one sequence may have."""
        return self.budget.cache_tokens

    def submit(self, job: GenerationJob) -> None:
        """Queue a job.

        Raises:
            RequestTooLargeError: if it can never fit.
            UnknownTokenError: if the model has no embedding for one of its tokens.
            EngineBusyError: if the queue is full.
            EngineStoppedError: if the engine is closed.
        """
        self.budget.check(job)
        if (wrong := self._model.unknown_token(job.prompt_ids)) is not None:
            n_tokens = self._model.n_embeddings
            raise UnknownTokenError(f"{wrong} is out of vocabulary; the model has {n_tokens} tokens, 0–{n_tokens - 1}")
        self._prefixes.expect(job)
        with self._changed:
            if self._closed:
                raise EngineStoppedError("the engine is closed")
            if len(self._waiting) >= self._max_queue + self._max_batch:
                raise EngineBusyError(f"{len(self._waiting)} requests are already waiting")
            self._waiting.append(job)
            self._changed.notify_all()

    def expect_changed_weights(self) -> None:
        """Stop using anything computed from the weights: a script has them and may change them at any time."""
        self._compiled_steps.stop("a script has the model's weights and may change them")
        unpack_weights(self._model.observed._module)
        dequantize_weights(self._model.observed._module)
        if self.prefix_cache.enabled:
            self._prefixes.turn_off("a script has the model's weights and may change them")

    def close(self) -> None:
        """Stop after the current step; jobs that have not finished fail."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._compiled_steps.stop()
        if (
            threading.current_thread() is not self._thread
        ):  # the engine's thread may itself collect the engine as garbage
            self._thread.join()

    def _empty(self) -> BatchRows:
        if self._cache_support.continuous:
            return SlotRows()
        return StaticRows(self._cache_support.new_cache, self._cache_support.modules)

    def _run(self) -> None:
        while self._wait_for_jobs():
            try:
                with torch.inference_mode():
                    while not self._closed and self._step():
                        pass
            except Exception as error:
                log.exception("the batch failed")
                self._fail_all(error)
                with torch.inference_mode():
                    self._record_dead_forward()
            self._rows = self._empty()  # nothing runs: give the memory back
        self._prefixes.clear()
        self._fail_all(EngineStoppedError("the engine was closed"))
        with self._changed:
            waiting, self._waiting = self._waiting, deque()
        for job in waiting:
            job.on_event(Failed(EngineStoppedError("the engine was closed")))

    def _wait_for_jobs(self) -> bool:
        """Wait for a job, and then a moment longer for others to batch with it; False if the engine is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting)
        if not self._closed:
            time.sleep(BATCHING_WINDOW_S)
        return not self._closed

    def _step(self) -> bool:
        """Read a piece of waiting prompts and decode one token for all running jobs; False if there was nothing to do."""
        if self._prefill is None and (self._joins or not self._running):
            self._prefill = self._admit()
        prefill = self._prefill
        if prefill is not None:
            self._read(prefill)
        self._remove_past_limit()
        if self._running:
            self._decode()
        return prefill is not None or bool(self._running or self._restarting)

    def _remove_past_limit(self) -> None:
        """Remove jobs from the batch whose next token is beyond the rotation's limit; all of their tokens are read again.

        transformers' own `generate` does the same where a rotation uses other frequencies beyond a limit.
        """
        limit = self._batching.limit
        rows = range(len(self._running))
        staying = [row for row in rows if limit is None or len(self._running[row].processed_ids) != limit]
        if len(staying) < len(rows):
            self._restarting.extend(one for row, one in enumerate(self._running) if row not in staying)
            self._running = [self._running[row] for row in self._rows.keep(staying)]

    def _fail_all(self, error: Exception) -> None:
        """Fail all jobs that run or are being prefilled."""
        for running in [*self._running, *self._restarting, *(self._prefill.running if self._prefill else [])]:
            running.job.on_event(Failed(error))
        self._running, self._prefill = [], None
        self._restarting.clear()

    def _record_dead_forward(self) -> None:
        """Count a forward of which no request succeeded; after several, stop the engine.

        The count restarts if the model can still run a token that belongs to no request.
        """
        self._failures = 0 if self._forwards.is_responsive() else self._failures + 1
        if self._failures == MAX_DEAD_FORWARDS:
            log.critical(
                "%d consecutive forwards failed and the model no longer responds: the engine stops", self._failures
            )
            with self._changed:
                self._closed = True

    def _isolate_failures(self, running: list[RunningJob], error: Exception, *, decoding: bool) -> list[RunningJob]:
        """Fail those jobs of a failed forward that fail alone too; returns the others.

        Args:
            running: the forward's jobs.
            error: why it failed.
            decoding: whether it was a decoding step.
        """
        log.warning("a forward of %d requests failed", len(running), exc_info=error)
        here = [one for one in running if not one.job.cancelled.is_set()]
        failures = [error] if len(here) == 1 else [self._forwards.error_alone(one, decoding=decoding) for one in here]
        if not any(failures) and self._retried_together:  # each succeeds alone, and together they fail a second time
            failures = [error] * len(here)
        self._retried_together = not any(failures)
        for one, failure in zip(here, failures, strict=True):
            if failure is not None:
                one.fail(failure)
        left = [one for one, failure in zip(here, failures, strict=True) if failure is None]
        if not left:
            self._record_dead_forward()
        return left

    def _admit(self) -> Prefill | None:
        """Take waiting jobs, as many as fit, and lay out their tokens. Jobs beyond the limit come first, one at a time."""
        lengths = [len(one.processed_ids) for one in self._running]
        while self._restarting:
            one = self._restarting[0]
            if one.job.cancelled.is_set():
                self._restarting.popleft()
            elif all(self._batching.together(len(one.processed_ids) + 1, other) for other in lengths):
                self._restarting.popleft()
                one.restart(self._memory)
                return Prefill.lay_out([one], self._rows.new())
            else:
                return None  # no job joins the running ones that it waits for
        with self._changed:
            self._waiting = deque(job for job in self._waiting if not job.cancelled.is_set())
            jobs = next_jobs(
                self._waiting,
                [running.job for running in self._running],
                self.budget,
                self._max_together,
                1 if self.batch_invariant else self._max_prefill_tokens,  # 1: each prompt is read alone
                self._batching.together,
                lengths,
                self._prefixes.unread,
                self._prefixes.waits,
            )
        if not jobs:
            return None
        self._prefixes.make_room(self.budget.room([*(running.job for running in self._running), *jobs]))
        if self._max_together == 1:
            self._rows = self._empty()  # the same memory layout as if nothing had run before
        started = [RunningJob.start(job, self._model, self._memory) for job in jobs]
        return self._prefixes.lay_out(started, self._rows.new())

    def _piece(self, prefill: Prefill) -> int:
        """Return how many columns of a prefill to read at once; some prompts must be read whole."""
        if not self._joins or self._batching.whole(prefill.width):
            return prefill.width
        if self.batch_invariant:
            return PIECE
        limit = self._max_prefill_tokens
        if prefill.all_logits:
            limit = min(limit, LOGITS_BYTES // (4 * self._model.observed.config.get_text_config().vocab_size))
        return max(1, limit // len(prefill.running))

    def _read(self, prefill: Prefill) -> None:
        """Read the next piece of a prefill; after the last piece, its jobs have their first token and join the running jobs.

        If the forward fails, those of its jobs that do not fail alone restart. Running jobs are not affected: they have a
        cache of their own.
        """
        start, stop = prefill.done, min(prefill.done + self._piece(prefill), prefill.width)
        mask, positions = prefill.inputs(stop)
        try:
            inputs = ForwardInputs(
                prefill.tokens[:, start:stop], mask, positions, prefill.cache, 0 if prefill.all_logits else 1
            )
            logits, prefill.cache = self._forwards.run(prefill.running, inputs)
        except Exception as error:  # noqa: BLE001 - any error is reported to the request that caused it
            left = self._isolate_failures(prefill.running, error, decoding=False)
            for one in left:
                one.restart(self._memory)
            self._prefill = Prefill.lay_out(left, self._rows.new()) if left else None
            return
        self._reset_failures()
        if prefill.all_logits:
            prefill.score(logits)
        prefill.done = stop
        if stop < prefill.width:
            if all(running.job.cancelled.is_set() for running in prefill.running):
                self._prefill = None
            return
        self._prefixes.keep_prompts(prefill)
        staying = self._advance(prefill.running, logits[:, -1])
        self._prefill = None
        if staying:
            self._running += [prefill.running[row] for row in staying]
            self._rows.add(prefill.cache, staying, prefill.padding, prefill.width)

    def _decode(self) -> None:
        """Decode one token for every running job.

        If the forward fails, it may have changed the cache of any job. The cache is then rebuilt for the jobs that do not fail
        alone.
        """
        self._steps[len(self._running)] += 1
        tokens = torch.tensor([[running.token_ids[-1]] for running in self._running])
        mask, positions = self._rows.step_inputs()
        shapes = self._shapes.step(mask) if self._shapes is not None else None
        compiled, begun = self._compiled_steps.step(), time.monotonic()
        try:
            inputs = ForwardInputs(tokens, mask, positions, self._rows.cache)
            logits, cache = self._forwards.run(self._running, inputs, shapes, compiled)
            self._compiled_steps.decoded(time.monotonic() - begun)
        except Exception as error:  # noqa: BLE001 - any error is reported to the request that caused it
            if compiled is not None:
                self._compiled_steps.stop("a step has failed")
            left = self._isolate_failures(self._running, error, decoding=True)
            self._running, self._rows = left, self._empty()
            if left:
                again = self._forwards.replay(left)
                self._rows.add(again.cache, list(range(len(left))), again.padding, again.width)
            return
        self._reset_failures()
        self._rows.stepped(cache)
        staying = self._advance(self._running, logits[:, -1])
        if len(staying) < len(self._running):
            for row in set(range(len(self._running))).difference(staying):
                if not self._running[row].job.cancelled.is_set():
                    self._prefixes.keep_completion(self._running[row], self._rows, row)
            self._running = [self._running[row] for row in self._rows.keep(staying)]

    def _reset_failures(self) -> None:
        """Reset the failure counters: a forward has succeeded."""
        self._failures, self._retried_together = 0, False

    def _advance(self, running: list[RunningJob], logits: Float[Tensor, "batch vocab"]) -> list[int]:
        """Choose the next tokens, and emit them and the results of jobs that have ended; returns the rows that continue."""
        logits = logits.float()
        actions = self._stop_actions(running) if any(one.watch for one in running) else {}
        samplers = [NO_SAMPLER if row in actions else one.sampler for row, one in enumerate(running)]
        # A row's maximum is not finite if any of its logits is NaN.
        usable = logits.amax(-1).isfinite().tolist()
        # Row by row, a row has a shape that does not depend on the batch.
        height = 1 if self.batch_invariant else len(running)
        chosen: list[int] = []
        for start in range(0, len(running), height):
            rows = slice(start, start + height)
            chosen += choose(logits[rows], samplers[rows])
        scores = self._scores(running, logits, chosen)
        staying = []
        for row, one in enumerate(running):
            try:
                if one.job.cancelled.is_set():
                    continue
                if row in actions:
                    goes_on = self._emit(one, one.apply_stop(actions[row]))
                elif not usable[row] and (failure := no_token(one.job)) is not None:
                    one.fail(failure)
                    continue
                else:
                    goes_on = self._emit_token(one, chosen[row], scores.get(row))
                if goes_on:
                    staying.append(row)
            except Exception as error:
                log.exception("a request could not take its token")
                one.fail(error)
        return staying

    def _scores(
        self, running: list[RunningJob], logits: Float[Tensor, "batch vocab"], chosen: list[int]
    ) -> dict[int, TokenScore]:
        """Return the scores of the chosen tokens, by row, of the jobs that asked for them."""
        rows = [row for row, one in enumerate(running) if one.job.score_tokens]
        if not rows:
            return {}
        samplings = [running[row].job.sampling for row in rows]
        their = logits if len(rows) == len(running) else logits[rows]
        found = score(their, [chosen[row] for row in rows], [sampling.top_logprobs for sampling in samplings])
        for place, (row, sampling) in enumerate(zip(rows, samplings, strict=True)):
            if named := sampling.logprob_token_ids:
                found[place] = replace(found[place], top=score_named(logits[row], (chosen[row], *named)))
        return dict(zip(rows, found, strict=True))

    def _emit_token(self, one: RunningJob, token: int, token_score: TokenScore | None) -> bool:
        """Add a job's next token and emit what follows from it; False if the job has ended."""
        return self._emit(one, one.advance(token, token_score) if one.job.sampling.max_tokens else "length")

    def _stop_actions(self, running: list[RunningJob]) -> dict[int, Action]:
        """Return, by row, the actions that probe scores require before tokens are chosen."""
        found: dict[int, Action] = {}
        for row, one in enumerate(running):
            try:
                if not one.job.cancelled.is_set() and (action := one.stop_action()) is not None:
                    found[row] = action
            except UnscorableError as error:
                one.fail(error)
        return found

    def _emit(self, one: RunningJob, reason: FinishReason | None) -> bool:
        """Emit a job's new text, and its result if there is a reason why it has ended; False if it has ended."""
        if one.sampler.failure is not None:
            one.fail(one.sampler.failure)
            return False
        delta = one.next_delta(final=reason is not None) if one.job.stream else None
        if delta is not None:
            one.job.on_event(delta)
        if reason is not None:
            one.finish(reason)
        return reason is None
