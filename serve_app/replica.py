"""A model replica: one copy of the weights, one engine thread, one store writer.

The replica answers from the moment its process runs: it loads the model on a thread and says meanwhile what it is doing, so
that `/health` can tell a slow start from a dead one. A request is rendered and checked here (only the replica has the
tokenizer), handed to the engine, and acknowledged only when the activations it asked for are durable.

Errors leave as data (`ApiError.payload`), see `openai_api.errors`.
"""

import asyncio
import logging
import os
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from ulid import ULID

from roentgen.contract import Positions
from roentgen.store import Receipt, StoreError, StoreWriter
from serve_app.capture.resolver import ResolutionError
from serve_app.capture.rows import CapturePlan, UncapturableError
from serve_app.capture.structure import CaptureRequestError
from serve_app.config import ServerConfig
from serve_app.engines.protocol import (
    Engine,
    EngineBusyError,
    EngineStoppedError,
    Event,
    Failed,
    Finished,
    GenerationJob,
    RequestTooLargeError,
    Sampling,
    TextDelta,
)
from serve_app.engines.transformers_engine import TransformersEngine
from serve_app.models import LoadedModel, load
from serve_app.openai_api import chat
from serve_app.openai_api.chat import ChatRequest
from serve_app.openai_api.errors import ApiError
from serve_app.openai_api.prompt import Prompt, render
from serve_app.rollouts import build_rollout, describe
from serve_app.sources import ModelNotFoundError, locate

log = logging.getLogger(__name__)

RETRY_AFTER_S = 2


@dataclass(frozen=True)
class _Ready:
    """What a replica that can serve has."""

    model: LoadedModel
    engine: Engine
    writer: StoreWriter


@dataclass(frozen=True)
class _Done:
    """A finished request; `activations` is there if they were asked for, and then durable."""

    finished: Finished
    activations: dict[str, Any] | None


class ModelReplica:
    """The model deployment; `app.build` makes it a Serve deployment."""

    def __init__(self, config: ServerConfig) -> None:
        """Start loading; returns at once."""
        self._config = config
        self._session_id = f"server-{str(ULID()).lower()}"
        self._ready: _Ready | None = None
        self._stage = "starting"
        self._failure: str | None = None
        threading.Thread(target=self._load, name="load", daemon=True).start()

    def __del__(self) -> None:
        if self._ready is not None:
            self._ready.engine.close()
            self._ready.writer.close()

    def check_health(self) -> None:
        """Tell Serve to restart this replica if its engine has died."""
        if self._ready is not None and not self._ready.engine.alive:
            raise RuntimeError("the engine's thread has died")

    async def status(self) -> dict[str, Any]:
        """Say how far the start is and, once it is done, what is served."""
        if self._ready is None:
            return {"status": "failed" if self._failure else "loading", "stage": self._failure or self._stage}
        model = self._ready.model
        card = {
            "id": model.source.name,
            "object": "model",
            "created": 0,
            "owned_by": "roentgen",
            "revision": model.source.revision,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "num_layers": model.structure.num_layers,
            "d_model": model.structure.d_model,
            "context_length": model.context_length,
        }
        return {"status": "ok", "stage": "ready", "model": card, "structure": model.structure.record()}

    async def chat(self, request: ChatRequest) -> dict[str, Any]:
        """Answer a request whole: `{"reply": …}` or `{"error": …}`."""
        try:
            prompt, plan = self._prepare(request)
            async for events in self._events(request, prompt, plan):
                if isinstance(events[-1], _Done):
                    return {"reply": self._reply(request, prompt, events[-1])}
        except ApiError as error:
            return {"error": error.payload()}
        raise AssertionError("a generation ended without a result")

    async def chat_stream(self, request: ChatRequest) -> AsyncIterator[list[dict[str, Any]]]:
        """Answer a request in pieces: lists of chunks that have come together; an error is a chunk `{"error": …}`.

        The first piece waits for the engine's first word, so that a refusal comes before anything else.
        """
        request_id = _completion_id()
        opening = [chat.chunk(request_id, request.model, {"role": "assistant", "content": ""})]
        try:
            prompt, plan = self._prepare(request)
            async for events in self._events(request, prompt, plan):
                chunks, opening = opening, []
                for event in events:
                    if isinstance(event, TextDelta):
                        chunks.append(chat.chunk(request_id, request.model, {"content": event.text}))
                    else:
                        chunks += self._last_chunks(request_id, request, prompt, event)
                yield chunks
        except ApiError as error:
            yield [{"error": error.payload()}]

    def _load(self) -> None:
        try:
            torch.set_num_threads(self._config.threads or os.cpu_count() or 1)
            writer = StoreWriter(self._config.store)
            self._say(f"finding {self._config.model}")
            source = locate(self._config.model, self._config.revision)
            model = load(source, self._config.dtype, self._config.device, self._say, self._config.device_map)
            engine = TransformersEngine(
                model,
                max_batch=self._config.max_batch,
                max_queue=self._config.max_queue,
                max_prefill_tokens=self._config.max_prefill_tokens,
                max_cache_tokens=self._config.max_cache_tokens,
            )
        except (ModelNotFoundError, ResolutionError, StoreError) as error:
            self._failure = str(error)
            log.error("the replica cannot start: %s", error)
        except Exception as error:
            self._failure = f"{type(error).__name__}: {error}"
            log.exception("the replica cannot start")
        else:
            self._ready = _Ready(model, engine, writer)
            self._say("ready")

    def _say(self, stage: str) -> None:
        self._stage = stage
        log.info("%s", stage)

    def _serving(self) -> _Ready:
        if self._ready is None:
            if self._failure:
                raise ApiError(503, f"the model could not be loaded: {self._failure}", code="model_failed")
            raise ApiError(503, f"the model is loading: {self._stage}", code="loading", retry_after_s=RETRY_AFTER_S)
        return self._ready

    def _prepare(self, request: ChatRequest) -> tuple[Prompt, CapturePlan | None]:
        """Check a request against the model and render its prompt.

        Raises:
            ApiError: if the model is another one, the prompt does not fit, or a hook point does not exist.
        """
        model = self._serving().model
        if request.model != model.source.name:
            raise ApiError(
                404,
                f"model {request.model!r} is not served here; this server has {model.source.name!r}",
                param="model",
                code="model_not_found",
            )
        prompt = render(model.tokenizer, request.messages, model.source.name)
        longest = model.context_length - len(prompt.token_ids)
        if longest < (request.token_limit or 1):
            raise ApiError(
                400,
                f"this model's context is {model.context_length} tokens; the messages take {len(prompt.token_ids)}"
                + (f" and the completion may take {request.token_limit}" if request.token_limit else "")
                + ": shorten one of them",
                param="messages",
                code="context_length_exceeded",
            )
        asked = request.activations
        if asked is None:
            return prompt, None
        try:
            taps = model.structure.resolve(asked)
        except CaptureRequestError as error:
            raise ApiError(400, str(error), param=error.param) from error
        first = prompt.turn_start if asked.since == "turn" else 0
        return prompt, CapturePlan(taps, Positions.parse(asked.positions), asked.dtype, first=first)

    async def _events(
        self, request: ChatRequest, prompt: Prompt, plan: CapturePlan | None
    ) -> AsyncIterator[list[TextDelta | _Done]]:
        """Run a request in the engine and yield what has happened since the last time; leaving early cancels it.

        Raises:
            ApiError: if the queue is full, or generation, capture or commit fails.
        """
        ready, loop = self._serving(), asyncio.get_running_loop()
        queue: asyncio.Queue[TextDelta | _Done | Failed] = asyncio.Queue()

        def tell(item: TextDelta | _Done | Failed) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, item)

        def listen(event: Event) -> None:  # on the engine's thread
            if not isinstance(event, Finished):
                tell(event)
            elif event.captured is None:
                tell(_Done(event, None))
            else:
                self._commit(ready, request, prompt, event, tell)

        job = GenerationJob(
            prompt_ids=prompt.token_ids,
            sampling=Sampling(
                max_tokens=request.token_limit or ready.model.context_length - len(prompt.token_ids),
                temperature=request.temperature,
                top_p=request.top_p,
                seed=request.seed,
                stop=tuple(request.stop),
            ),
            listener=listen,
            capture=plan,
            stream=request.stream,
        )
        try:
            ready.engine.submit(job)
        except RequestTooLargeError as error:
            raise ApiError(400, str(error), code="request_too_large") from error
        except EngineBusyError as error:
            raise ApiError(429, f"the server is busy: {error}", code="busy", retry_after_s=RETRY_AFTER_S) from error
        except EngineStoppedError as error:
            raise ApiError(503, str(error), retry_after_s=RETRY_AFTER_S) from error
        try:
            while True:
                arrived = [await queue.get()]
                while not queue.empty():
                    arrived.append(queue.get_nowait())
                events = [event for event in arrived if not isinstance(event, Failed)]
                if events:
                    yield events
                if isinstance(arrived[-1], Failed):
                    raise _as_api_error(arrived[-1].error) from arrived[-1].error
                if isinstance(arrived[-1], _Done):
                    return
        finally:
            job.cancelled.set()

    def _commit(self, ready: _Ready, request: ChatRequest, prompt: Prompt, finished: Finished, tell: Any) -> None:
        """Hand a finished rollout to the store; the request hears of it when it is durable."""
        asked, captured = request.activations, finished.captured
        assert asked is not None
        assert captured is not None
        try:
            rollout = build_rollout(
                ready.model, prompt, asked, finished, captured, asked.session_id or self._session_id, str(ULID())
            )
            future = ready.writer.submit(rollout)
        except (StoreError, ValueError) as error:
            tell(Failed(error))
            return

        def committed(future: "Future[Receipt]") -> None:  # on the writer's thread
            error = future.exception()
            if error is None:
                tell(_Done(finished, describe(rollout, future.result())))
            else:
                tell(Failed(StoreError(f"the activations could not be stored: {error}")))

        future.add_done_callback(committed)

    def _reply(self, request: ChatRequest, prompt: Prompt, done: _Done) -> dict[str, Any]:
        finished = done.finished
        usage = chat.usage(len(prompt.token_ids), len(finished.token_ids))
        return chat.completion(
            _completion_id(), request.model, finished.text, finished.finish_reason, usage, done.activations
        )

    def _last_chunks(self, request_id: str, request: ChatRequest, prompt: Prompt, done: _Done) -> list[dict[str, Any]]:
        chunks = [chat.chunk(request_id, request.model, {}, done.finished.finish_reason)]
        extra: dict[str, Any] = {}
        if request.stream_options is not None and request.stream_options.include_usage:
            extra["usage"] = chat.usage(len(prompt.token_ids), len(done.finished.token_ids))
        if done.activations is not None:
            extra["activations"] = done.activations
        return [*chunks, chat.last_chunk(request_id, request.model, extra)] if extra else chunks


def _completion_id() -> str:
    return f"chatcmpl-{str(ULID()).lower()}"


def _as_api_error(error: Exception) -> ApiError:
    """Spell an engine's or the store's failure for a client."""
    if isinstance(error, EngineStoppedError):
        return ApiError(503, str(error), retry_after_s=RETRY_AFTER_S)
    if isinstance(error, UncapturableError):
        return ApiError(400, f"activations.hook_points: {error}", param="activations.hook_points")
    if isinstance(error, StoreError):
        return ApiError(500, str(error), code="activations_not_stored")
    return ApiError(500, f"the generation failed: {type(error).__name__}: {error}", code="generation_failed")
