"""The replica's side of the vLLM engine: jobs in, events out, on a thread with an event loop of its own.

vLLM schedules, batches and samples. The rest of the contract is here. A job's tokens become text, with its stop strings found
(`engines.completion`). A cancelled job is aborted, and a full queue rejects jobs. Captured rows stay within the host's memory:
a job that captures is submitted to vLLM when its rows fit beside those of the other jobs.
"""

import asyncio
import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from ulid import ULID
from vllm import TokensPrompt
from vllm.v1.engine.exceptions import EngineDeadError

from serve_app.capture.late_end import collecting_plan
from serve_app.capture.probe_scores import NewScores
from serve_app.capture.steering import different_sums
from serve_app.engines.completion import CompletionState, no_token, text_stream
from serve_app.engines.constraints import SchemaError
from serve_app.engines.memory_budget import HOST_SHARE, free_host_memory, row_bytes
from serve_app.engines.probe_stopping import Action
from serve_app.engines.protocol import (
    FORCED,
    EngineBusyError,
    EngineStoppedError,
    Failed,
    Finished,
    GenerationJob,
    Load,
    PrefixCaching,
    RequestTooLargeError,
    TokenScore,
    WorkerRows,
)
from serve_app.engines.served_model import ServedModel
from serve_app.engines.vllm.forced_tokens import acting_rule
from serve_app.engines.vllm.salts import Salts, rows_needed
from serve_app.engines.vllm.sampling_params import sampling_params, token_score
from serve_app.engines.vllm.score_receiver import ScoreReceiver
from serve_app.engines.vllm.worker_messages import (
    VECTORS_PER_REQUEST,
    CaptureRequest,
    SyncMessage,
    SyncReply,
    pack,
    unpack,
)
from serve_app.engines.vllm.worker_storage import WorkerStorage

log = logging.getLogger(__name__)

WATCH_S = 0.05
"""Interval between checks for cancelled jobs, in seconds."""


class Client(Protocol):
    """The part of vLLM's `AsyncLLM` that is used."""

    errored: bool
    vllm_config: Any

    def generate(self, prompt: Any, sampling_params: Any, request_id: str) -> Any:
        """Generate; yields outputs as they are computed."""

    async def collective_rpc(self, method: str, *, args: tuple[Any, ...] = ()) -> list[Any]:
        """Call a method of every worker."""

    def shutdown(self) -> None:
        """End vLLM's processes."""


class EngineLoop:
    """A thread with an event loop, on which vLLM's client is created and used.

    The client belongs to the loop that it was first used on.
    """

    def __init__(self, make: Callable[[], Client]) -> None:
        """Start the thread and wait for the client.

        Args:
            make: starts vLLM.
        """
        self.loop = asyncio.new_event_loop()
        ready: Future[Client] = Future()

        async def begin() -> None:
            try:
                ready.set_result(make())
            except BaseException as error:  # noqa: BLE001 - raised again by the caller that waits for it
                ready.set_exception(error)

        def run() -> None:
            asyncio.set_event_loop(self.loop)
            self.loop.create_task(begin())
            self.loop.run_forever()

        self.thread = threading.Thread(target=run, name="engine", daemon=True)
        self.thread.start()
        try:
            self.client = ready.result()
        except BaseException:
            self.stop()
            raise

    def run(self, make: Callable[[], Any]) -> Any:
        """Run a coroutine on the loop, from another thread, and return its result."""
        return asyncio.run_coroutine_threadsafe(make(), self.loop).result()

    def stop(self) -> None:
        """End the thread."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()


class VllmEngine:
    """Generates with vLLM (see the module)."""

    name = "vllm"

    def __init__(
        self,
        loop: EngineLoop,
        model: ServedModel,
        *,
        max_model_len: int,
        captures: bool,
        max_batch: int,
        max_queue: int,
        prefix_cache: PrefixCaching,
        batch_invariant: bool = False,
    ) -> None:
        """Create an engine for a client whose model is loaded.

        Args:
            loop: the client's event loop.
            model: the loaded model.
            max_model_len: most tokens of one sequence.
            captures: whether its workers capture.
            max_batch: requests that run together.
            max_queue: requests that may wait.
            prefix_cache: whether vLLM was started with its prefix cache.
            batch_invariant: whether vLLM was started in batch-invariant mode.
        """
        self._batching = model.batching
        self.batch_invariant = batch_invariant
        self.prefix_cache = prefix_cache
        self._loop = loop
        self._client = loop.client
        self._model = model
        self._max_model_len = max_model_len
        self._captures = captures
        self._max_batch = max_batch
        self._max_jobs = max_batch + max_queue
        self._row_budget = int(free_host_memory() * HOST_SHARE)
        self._bytes_per_row = model.structure.d_model * model.dtype.itemsize
        self._closed = False
        self._lock = threading.Lock()
        self._jobs: dict[str, tuple[GenerationJob, asyncio.Task[bool] | None]] = {}
        self._queue: deque[str] = deque()
        self._row_bytes: dict[str, int] = {}
        self._names: dict[str, str] = {}
        self._salts = Salts()
        self._hits = self._misses = 0
        self.storage = WorkerStorage(loop.loop, self._sync)
        self._scores = ScoreReceiver(self._new_scores)
        self._watching = asyncio.run_coroutine_threadsafe(self._watch(), loop.loop)

    @property
    def alive(self) -> bool:
        """Whether the engine's thread and vLLM's processes run."""
        return self._loop.thread.is_alive() and not self._client.errored

    @property
    def load(self) -> Load:
        """Its current load and its counters."""
        with self._lock:
            handed_over = sum(task is not None for _, task in self._jobs.values())
            jobs = len(self._jobs)
        running = min(handed_over, self._max_batch)
        return Load(
            running,
            jobs - running,
            cache_bytes=self.storage.prefix_bytes,
            cache_hits=self._hits,
            cache_misses=self._misses,
        )

    @property
    def max_model_len(self) -> int:
        """Most tokens of one sequence."""
        return self._max_model_len

    def submit(self, job: GenerationJob) -> None:
        """Queue a job.

        Raises:
            RequestTooLargeError: if it can never fit.
            EngineBusyError: if the queue is full.
            EngineStoppedError: if the engine is closed.
        """
        size = self._check(job)
        job_id = str(ULID())
        with self._lock:
            if self._closed or not self.alive:
                raise EngineStoppedError("the engine is closed")
            if len(self._jobs) >= self._max_jobs:
                raise EngineBusyError(f"{len(self._jobs)} requests are already waiting")
            self._jobs[job_id] = (job, None)
        self._loop.loop.call_soon_threadsafe(self._enqueue, job_id, size)

    def close(self) -> None:
        """Stop; unfinished jobs fail. Rows that the store has received are committed."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._loop.thread.is_alive():
            self._loop.run(self._end)
            self._loop.stop()

    def _check(self, job: GenerationJob) -> int:
        """Return the bytes that a job's rows may take.

        Raises:
            RequestTooLargeError: if they can never fit.
        """
        total = len(job.prompt_ids) + job.sampling.max_tokens
        if total > self._max_model_len:
            raise RequestTooLargeError(
                f"the prompt's {len(job.prompt_ids)} tokens and up to {job.sampling.max_tokens} new ones need room for "
                f"{total} tokens; a sequence may have {self._max_model_len}"
            )
        vectors = different_sums(job.steering, len(job.prompt_ids), total)
        if vectors > VECTORS_PER_REQUEST:
            raise RequestTooLargeError(
                f"steering: {vectors} different vectors, counting their sums at different tokens, are too many; a "
                f"request may add {VECTORS_PER_REQUEST}"
            )
        if job.capture is None:
            return 0
        plan = collecting_plan(job.capture, len(job.prompt_ids))
        size = row_bytes(plan, len(job.prompt_ids), total, self._bytes_per_row)
        if size > self._row_budget:
            raise RequestTooLargeError(
                f"the requested activations may take {size / 1e6:,.0f} MB; {self._row_budget / 1e6:,.0f} MB are reserved "
                "for them: ask for fewer layers, hook points, positions or tokens"
            )
        return size

    def _enqueue(self, job_id: str, size: int) -> None:
        if job_id not in self._jobs:
            return  # the engine was closed meanwhile
        self._row_bytes[job_id] = size
        self._queue.append(job_id)
        self._admit()

    def _admit(self) -> None:
        """Submit waiting jobs to vLLM, in order, as far as they may run together and their rows fit."""
        with self._lock:  # others submit meanwhile
            handed_over = {job_id: job for job_id, (job, task) in self._jobs.items() if task is not None}
        running = list(handed_over.values())
        held = sum(self._row_bytes[job_id] for job_id in handed_over)
        while self._queue:
            job_id = self._queue[0]
            job, _ = self._jobs[job_id]
            if held and held + self._row_bytes[job_id] > self._row_budget:
                return
            if not all(self._batching.together(len(job.prompt_ids), len(other.prompt_ids)) for other in running):
                return
            running.append(job)
            held += self._row_bytes[job_id]
            self._queue.popleft()
            task = self._loop.loop.create_task(self._run(job_id, job))
            task.add_done_callback(partial(self._leave, job_id))
            self._jobs[job_id] = (job, task)

    async def _run(self, job_id: str, job: GenerationJob) -> bool:
        """Run one job and emit its last event; returns whether its rows are now the caller's to store."""
        event: Finished | Failed
        try:
            event = await self._generate(job_id, job)
        except EngineDeadError:
            event = Failed(EngineStoppedError("vLLM's engine has died"))
        except Exception as error:
            log.exception("a job failed")
            event = Failed(error)
        if job.cancelled.is_set():
            return False
        job.on_event(event)
        return isinstance(event, Finished) and event.worker_rows is not None

    def _leave(self, job_id: str, task: "asyncio.Task[bool]") -> None:
        """Drop a job that has ended, or was cancelled, perhaps before it started."""
        with self._lock:
            job, _ = self._jobs.pop(job_id)
        del self._row_bytes[job_id]
        name = self._names.pop(job_id, job_id)
        if task.cancelled() and not job.cancelled.is_set():
            job.on_event(Failed(EngineStoppedError("the engine was closed")))
        if _capture_request(name, job) is not None and (task.cancelled() or not task.result()):
            self.storage.forget(name)
        self._scores.forget(name)
        self._admit()

    async def _generate(self, job_id: str, job: GenerationJob) -> Finished | Failed:
        """Generate a job's tokens.

        If rows of its cached prompt tokens have been dropped, it starts again before anything is emitted.
        """
        tries = 0
        while True:
            name = self._names[job_id] = f"{job_id}.{tries}" if tries else job_id
            event = await self._try(name, job)
            if event is not None:
                return event
            self.storage.forget(name)
            self._scores.forget(name)
            tries += 1

    async def _try(self, job_id: str, job: GenerationJob) -> Finished | Failed | None:
        """Generate a job's tokens, under an id that workers know it by; returns None if it must be tried again."""
        stop_token_ids = job.sampling.all_stop_token_ids(self._model.eos_token_ids)
        request = _capture_request(job_id, job, stop_token_ids)
        salt = self._salts.of(job)
        to_check = self._captures and rows_needed(job)
        if job.probes:
            self._scores.begin(job_id, job.probes)
        model, sampling = self._model, job.sampling
        completion = CompletionState(
            job=job,
            text=text_stream(job, model),
            all_stop_token_ids=stop_token_ids,
        )
        prompt_scores: list[TokenScore] = []
        prompt = TokensPrompt(prompt_token_ids=job.prompt_ids)
        if salt is not None:
            prompt["cache_salt"] = salt
        outputs = self._client.generate(prompt, sampling_params(job, stop_token_ids, request), job_id)
        reason, cached = None, 0
        async for output in outputs:
            cached = output.num_cached_tokens or cached
            if to_check and cached and not await self._resumed(job_id):
                await outputs.aclose()
                self._salts.renew(job, salt)
                return None
            to_check = False
            if output.prompt_logprobs and not prompt_scores:
                prompt_scores = [
                    token_score(token, found, max(sampling.top_logprobs, sampling.prompt_logprobs or 0))
                    for token, found in zip(job.prompt_ids[1:], output.prompt_logprobs[1:], strict=True)
                ]
            choice = output.outputs[0]
            found = choice.logprobs or ()  # also there if a logit is NaN, even if the job does not ask
            unusable = any(math.isnan(next(iter(position.values())).logprob) for position in found)
            if unusable and (failure := no_token(job)) is not None:
                await outputs.aclose()
                return Failed(failure)
            for token, score in zip(choice.token_ids, _scores(job, choice.token_ids, found), strict=True):
                if reason is not None or not sampling.max_tokens:
                    continue
                if score is not None and (rule := acting_rule(job.stopping, score.logprob)) is not None:
                    reason = completion.act(Action(rule, len(job.prompt_ids) + len(completion.token_ids) - 1))
                    score = FORCED
                reason = reason or completion.push(token, score)
            if output.metrics is not None:
                # vLLM's core is another process on this machine, with the same monotonic clock.
                completion.start_time = output.metrics.scheduled_ts or completion.start_time
                completion.first_token_time = output.metrics.first_token_ts or completion.first_token_time
            probed = partial(self._scores.new_scores, job_id, completion.n_rows) if job.probes else None
            final = reason is not None or output.finished
            if job.stream and (delta := completion.delta(final=final, probed=probed)) is not None:
                job.on_event(delta)
            if choice.finish_reason in ("error", "abort"):
                return Failed(_failure(job, choice.finish_reason))
            if reason is not None and not output.finished:
                await outputs.aclose()  # vLLM does not know of stop strings and would continue
                break
        if self.prefix_cache.enabled and not job.score_prompt:
            self._hits += cached
            self._misses += len(job.prompt_ids) - cached
        scored = await self._scores.all(job_id, completion.n_scored) if job.probes else []
        return replace(
            completion.finished(reason or "length", scored),
            worker_rows=WorkerRows(job_id) if job.capture is not None else None,
            prompt_scores=prompt_scores if job.score_prompt else None,
            cached_tokens=cached,
        )

    async def _watch(self) -> None:
        """Abort jobs that have been cancelled."""
        while True:
            await asyncio.sleep(WATCH_S)
            with self._lock:
                jobs = list(self._jobs.items())
            for job_id, (job, task) in jobs:
                if not job.cancelled.is_set():
                    continue
                if task is not None:
                    task.cancel()
                elif job_id in self._queue:
                    self._queue.remove(job_id)
                    with self._lock:
                        del self._jobs[job_id]
                    del self._row_bytes[job_id]
                    self._admit()

    async def _sync(self, message: SyncMessage) -> SyncReply:
        replies = await self._client.collective_rpc("roentgen_sync", args=(pack(message),))
        return unpack(next(reply for reply in replies if reply is not None), SyncReply)

    async def _resumed(self, job_id: str) -> bool:
        """Return whether the workers have the rows of the prompt tokens that a job has found in the cache."""
        replies = await self._client.collective_rpc("roentgen_resumed", args=([job_id],))
        found: dict[str, bool] = unpack(next(reply for reply in replies if reply is not None), dict)
        return found[job_id]

    async def _new_scores(self, job_ids: list[str]) -> dict[str, NewScores]:
        replies = await self._client.collective_rpc("roentgen_scores", args=(job_ids,))
        found: dict[str, NewScores] = unpack(next(reply for reply in replies if reply is not None), dict)
        return found

    async def _end(self) -> None:
        self._watching.cancel()
        tasks = [task for _, task in self._jobs.values() if task is not None]
        waiting = [job for job, task in self._jobs.values() if task is None]
        self._queue.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._jobs.clear()
        for job in waiting:
            job.on_event(Failed(EngineStoppedError("the engine was closed")))
        if self._captures and not self._client.errored:
            await self._client.collective_rpc("roentgen_close")
        self.storage.fail_all(EngineStoppedError("the engine was closed"))
        self._client.shutdown()


def _capture_request(
    job_id: str, job: GenerationJob, stop_token_ids: frozenset[int] = frozenset()
) -> CaptureRequest | None:
    """Return a job's capture request; None if its workers have nothing to do."""
    if job.capture is None and not job.steering and not job.probes:
        return None
    end = min(stop_token_ids, default=None)
    return CaptureRequest(job_id, job.capture, job.steering, job.probes, job.cache_salt, job.stopping, end)


def _scores(
    job: GenerationJob, tokens: Sequence[int], found: Sequence[Mapping[int, Any]]
) -> Sequence[TokenScore | None]:
    """Return the scores of tokens; None for each if the job does not ask."""
    if not job.score_tokens:
        return [None] * len(tokens)
    top, named = job.sampling.top_logprobs, job.sampling.logprob_token_ids
    return [token_score(token, position, top, named) for token, position in zip(tokens, found, strict=True)]


def _failure(job: GenerationJob, reason: str) -> Exception:
    if job.constraint is not None:
        return SchemaError(job.constraint.param, "the grammar cannot be followed any further")
    return RuntimeError(f"vLLM ended the request: {reason}")
