"""The engine that runs everywhere: a continuous batch of requests through the nnsight-wrapped transformers model.

One thread owns the model, because nnsight has one interleaver per model and no lock. Between any two steps it

1. admits requests that have arrived, as far as memory allows (`admission`), and prefills them together in a forward of their
   own. A prefill is bounded; a prompt longer than the bound is read in pieces, with a step of the running ones between
   each two, so that nobody waits long;
2. decodes one token for every running request, in one forward over keys and values that stay where they are (`kv_cache`);
3. lets finished and cancelled requests go: their slots are free at once, and their activations are cut and handed on while
   the others go on.

Every forward runs through `Forwards`, with what its requests want to capture of it. When one fails, each of its requests is
tried alone: those that fail alone have failed, the others go on. If several times in a row no request passes, nor a token of
nobody's (a broken GPU answers nothing else), the engine gives up, and the replica is restarted.

A model whose cache cannot be joined runs in static batches, and the engine says so when it starts. One whose cache the
engine cannot keep at all is refused then (`model_cache`).

Batch-invariant, nothing of a request depends on what runs beside it, to the last bit: each prompt is read alone in pieces of
one size, steps compute rows in fixed shapes (`invariance`), and tokens are chosen row by row. A model that cannot is run one
request at a time.
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

GATHER_S = 0.02
"""How long an idle engine waits for company after a first request: requests sent together should run together."""

PREFILL_TOKENS = {"cpu": 512, "cuda": 8192}
"""Tokens of one prefill: enough to fill the device, and few enough for the running requests to wait for."""

LOGITS_BYTES = 256 << 20
"""Logits of one prefill that needs them at every position; beyond, it is read in more pieces."""

NO_CHOICE = Sampler(Sampling(max_tokens=0, temperature=0), [], frozenset())
"""Stands for the sampler of a row whose token is not chosen: it draws nothing."""

MAX_FAILURES = 3
"""Failures in a row, each of a model that answers nothing any more, after which the engine gives up."""


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
            model: the model; this engine's thread is the only one to run it from now on.
            max_batch: requests generated together.
            max_queue: requests waiting for that.
            max_prefill_tokens: the most that one prefill takes, padding included; 0 for what suits the device.
            max_cache_tokens: size of the KV cache, 0 for what the free memory allows.
            batch_invariant: whether a request's tokens, scores and rows must not depend on what runs beside it.
            prefix_cache: whether what has been read of a prompt is kept for the next one that begins in the same way.
            eager: whether steps are never compiled.
            compile_first: whether to wait until they are compiled.

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
        self._together = max_batch
        if reason:
            self._together = 1
            log.warning("%s runs one request at a time to be batch-invariant: %s", model.source.name, reason)
        elif self._cache_support.alone or model.batching.kind == "alone":
            self._together = 1
            log.warning("%s continues one sequence at a time: requests run one after the other", model.source.name)
        elif not self._joins:
            log.warning("%s has batches that requests cannot join: they run in static batches", model.source.name)
        if not batch_invariant:  # whose products are of plain weights, in shapes that were tried
            pack_weights(model.observed._module, free_host_memory())
        self.budget = Budget.measure(model, max_cache_tokens, max_batch=max_batch, cache_support=self._cache_support)
        log.info("room for %d tokens in the KV cache", self.budget.cache_tokens)
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
        self._retried = False
        self._running: list[RunningJob] = []
        self._steps: Counter[int] = Counter()
        self._prefill: Prefill | None = None
        self._crossing: deque[RunningJob] = deque()
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
        """Whether what has been read of prompts is kept."""
        return self._prefixes.state

    @property
    def load(self) -> Load:
        """What it has to do now, and has done."""
        prefill = self._prefill
        running = len(self._running) + len(self._crossing) + (len(prefill.running) if prefill else 0)
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
                raise EngineBusyError(f"{len(self._waiting)} requests are waiting already")
            self._waiting.append(job)
            self._changed.notify_all()

    def expect_changed_weights(self) -> None:
        """Keep nothing from now on that was computed from the weights: a script has them, and may change them at any time."""
        self._compiled_steps.stop("a script has the model's weights, and may change them")
        unpack_weights(self._model.observed._module)
        dequantize_weights(self._model.observed._module)
        if self.prefix_cache.enabled:
            self._prefixes.turn_off("a script has the model's weights, and may change them")

    def close(self) -> None:
        """Stop after the current step; jobs that have not finished fail."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._compiled_steps.stop()
        if threading.current_thread() is not self._thread:  # on which garbage is collected too
            self._thread.join()

    def _empty(self) -> BatchRows:
        if self._cache_support.continuous:
            return SlotRows()
        return StaticRows(self._cache_support.new_cache, self._cache_support.modules)

    def _run(self) -> None:
        while self._wait_for_jobs():
            try:
                with torch.inference_mode():
                    while not self._closed and self._turn():
                        pass
            except Exception as error:
                log.exception("the batch failed")
                self._fail_all(error)
                with torch.inference_mode():
                    self._count_failure()
            self._rows = self._empty()  # nothing runs: give the memory back
        self._prefixes.clear()
        self._fail_all(EngineStoppedError("the engine was closed"))
        with self._changed:
            waiting, self._waiting = self._waiting, deque()
        for job in waiting:
            job.on_event(Failed(EngineStoppedError("the engine was closed")))

    def _wait_for_jobs(self) -> bool:
        """Wait until there is something to do, and a moment longer for company; False when the engine is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting)
        if not self._closed:
            time.sleep(GATHER_S)
        return not self._closed

    def _turn(self) -> bool:
        """Read a piece of waiting prompts and decode one token for all that run; False if there was nothing to do."""
        if self._prefill is None and (self._joins or not self._running):
            self._prefill = self._admit()
        prefill = self._prefill
        if prefill is not None:
            self._read(prefill)
        self._cross()
        if self._running:
            self._decode()
        return prefill is not None or bool(self._running or self._crossing)

    def _cross(self) -> None:
        """Take jobs out of the batch whose next token is beyond the limit: all of their tokens are to be read again.

        That is what transformers' own `generate` does where a rotation takes other frequencies beyond a limit.
        """
        limit = self._batching.limit
        rows = range(len(self._running))
        staying = [row for row in rows if limit is None or len(self._running[row].processed_ids) != limit]
        if len(staying) < len(rows):
            self._crossing.extend(one for row, one in enumerate(self._running) if row not in staying)
            self._running = [self._running[row] for row in self._rows.keep(staying)]

    def _fail_all(self, error: Exception) -> None:
        """Fail all jobs that run or are being prefilled."""
        for running in [*self._running, *self._crossing, *(self._prefill.running if self._prefill else [])]:
            running.job.on_event(Failed(error))
        self._running, self._prefill = [], None
        self._crossing.clear()

    def _count_failure(self) -> None:
        """Count a failure of which nobody was left, unless the model still answers; after several, give up."""
        self._failures = 0 if self._forwards.answers() else self._failures + 1
        if self._failures == MAX_FAILURES:
            log.critical("%d failures in a row: the engine gives up", self._failures)
            with self._changed:
                self._closed = True

    def _innocent(self, running: list[RunningJob], error: Exception, *, decoding: bool) -> list[RunningJob]:
        """Fail those jobs of a failed forward that fail alone too; returns the others.

        Args:
            running: the forward's jobs.
            error: why it failed.
            decoding: whether it was a step.
        """
        log.warning("a forward of %d requests failed", len(running), exc_info=error)
        here = [one for one in running if not one.job.cancelled.is_set()]
        failures = [error] if len(here) == 1 else [self._forwards.failure_alone(one, decoding=decoding) for one in here]
        if not any(failures) and self._retried:  # each passes alone, and not together for a second time
            failures = [error] * len(here)
        self._retried = not any(failures)
        for one, failure in zip(here, failures, strict=True):
            if failure is not None:
                one.fail(failure)
        left = [one for one, failure in zip(here, failures, strict=True) if failure is None]
        if not left:
            self._count_failure()
        return left

    def _admit(self) -> Prefill | None:
        """Take waiting jobs, as many as fit, and lay out their tokens; those that cross a limit come first, one by one."""
        lengths = [len(one.processed_ids) for one in self._running]
        while self._crossing:
            one = self._crossing[0]
            if one.job.cancelled.is_set():
                self._crossing.popleft()
            elif all(self._batching.together(len(one.processed_ids) + 1, other) for other in lengths):
                self._crossing.popleft()
                one.restart(self._memory)
                return Prefill.lay_out([one], self._rows.new())
            else:
                return None  # nobody joins those that it waits for
        with self._changed:
            self._waiting = deque(job for job in self._waiting if not job.cancelled.is_set())
            jobs = next_jobs(
                self._waiting,
                [running.job for running in self._running],
                self.budget,
                self._together,
                1 if self.batch_invariant else self._max_prefill_tokens,  # 1: a prompt is read alone
                self._batching.together,
                lengths,
                self._prefixes.unread,
                self._prefixes.waits,
            )
        if not jobs:
            return None
        self._prefixes.make_room(self.budget.room([*(running.job for running in self._running), *jobs]))
        if self._together == 1:
            self._rows = self._empty()  # so that the memory it computes on lies as if nothing had run before
        started = [RunningJob.start(job, self._model, self._memory) for job in jobs]
        return self._prefixes.lay_out(started, self._rows.new())

    def _piece(self, prefill: Prefill) -> int:
        """Return how many columns of a prefill to read at once; some prompts are read whole."""
        if not self._joins or self._batching.whole(prefill.width):
            return prefill.width
        if self.batch_invariant:
            return PIECE
        limit = self._max_prefill_tokens
        if prefill.all_logits:
            limit = min(limit, LOGITS_BYTES // (4 * self._model.observed.config.get_text_config().vocab_size))
        return max(1, limit // len(prefill.running))

    def _read(self, prefill: Prefill) -> None:
        """Read the next piece of a prefill; after the last, its jobs have their first token and join the running ones.

        If the forward fails, those of its jobs that do not fail alone begin again; the running ones have a cache of their own.
        """
        start, stop = prefill.done, min(prefill.done + self._piece(prefill), prefill.width)
        mask, positions = prefill.inputs(stop)
        try:
            inputs = ForwardInputs(
                prefill.tokens[:, start:stop], mask, positions, prefill.cache, 0 if prefill.all_logits else 1
            )
            logits, prefill.cache = self._forwards.run(prefill.running, inputs)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told to the request that caused it
            left = self._innocent(prefill.running, error, decoding=False)
            for one in left:
                one.restart(self._memory)
            self._prefill = Prefill.lay_out(left, self._rows.new()) if left else None
            return
        self._passed()
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

        If the forward fails, it may have changed the cache of any of them: it is made anew of those that do not fail alone.
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
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told to the request that caused it
            if compiled is not None:
                self._compiled_steps.stop("a step has failed")
            left = self._innocent(self._running, error, decoding=True)
            self._running, self._rows = left, self._empty()
            if left:
                again = self._forwards.replayed(left)
                self._rows.add(again.cache, list(range(len(left))), again.padding, again.width)
            return
        self._passed()
        self._rows.stepped(cache)
        staying = self._advance(self._running, logits[:, -1])
        if len(staying) < len(self._running):
            for row in set(range(len(self._running))).difference(staying):
                if not self._running[row].job.cancelled.is_set():
                    self._prefixes.keep_completion(self._running[row], self._rows, row)
            self._running = [self._running[row] for row in self._rows.keep(staying)]

    def _passed(self) -> None:
        """Forget earlier failures: a forward has passed."""
        self._failures, self._retried = 0, False

    def _advance(self, running: list[RunningJob], logits: Float[Tensor, "batch vocab"]) -> list[int]:
        """Choose the next tokens, report them and the jobs that have ended; returns the rows that go on."""
        logits = logits.float()
        actions = self._asked(running) if any(one.watch for one in running) else {}
        samplers = [NO_CHOICE if row in actions else one.sampler for row, one in enumerate(running)]
        # As large as its largest logit: not a number if one of them is none.
        usable = logits.amax(-1).isfinite().tolist()
        # Row by row, a row's shape is its own.
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
                    goes_on = self._reported(one, one.carry_out(actions[row]))
                elif not usable[row] and (failure := no_token(one.job)) is not None:
                    one.fail(failure)
                    continue
                else:
                    goes_on = self._goes_on(one, chosen[row], scores.get(row))
                if goes_on:
                    staying.append(row)
            except Exception as error:
                log.exception("a request could not take its token")
                one.fail(error)
        return staying

    def _scores(
        self, running: list[RunningJob], logits: Float[Tensor, "batch vocab"], chosen: list[int]
    ) -> dict[int, TokenScore]:
        """Return how likely the chosen tokens were, by row, of the jobs that asked."""
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

    def _goes_on(self, one: RunningJob, token: int, token_score: TokenScore | None) -> bool:
        """Give a job its next token and report what it means; False if the job has ended."""
        return self._reported(one, one.advance(token, token_score) if one.job.sampling.max_tokens else "length")

    def _asked(self, running: list[RunningJob]) -> dict[int, Action]:
        """Return, by row, what the scores of jobs' probes ask for, before tokens are chosen."""
        found: dict[int, Action] = {}
        for row, one in enumerate(running):
            try:
                if not one.job.cancelled.is_set() and (action := one.asked()) is not None:
                    found[row] = action
            except UnscorableError as error:
                one.fail(error)
        return found

    def _reported(self, one: RunningJob, reason: FinishReason | None) -> bool:
        """Report what a job has now, and its result if there is a reason why it has ended; False if it has."""
        if one.sampler.failure is not None:
            one.fail(one.sampler.failure)
            return False
        delta = one.news(final=reason is not None) if one.job.stream else None
        if delta is not None:
            one.job.on_event(delta)
        if reason is not None:
            one.finish(reason)
        return reason is None
