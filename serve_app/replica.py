"""A model replica: one copy of the weights, one engine thread, one store writer.

The replica answers from the moment its process runs: it loads the model on a thread and says meanwhile what it is doing, so
that `/health` can tell a slow start from a dead one. A request is rendered and checked here (only the replica has the
tokenizer), run as one or more choices (`generation`), and acknowledged only when the activations it asked for are durable.

Errors leave as data (`ApiError.payload`), see `openai_api.errors`.
"""

import logging
import os
import threading
from collections.abc import AsyncIterator
from typing import Any

import torch
from ulid import ULID

from roentgen.store import StoreError, StoreWriter
from serve_app.capture.resolver import ResolutionError
from serve_app.config import ServerConfig
from serve_app.engines.transformers_engine import TransformersEngine
from serve_app.generation import RETRY_AFTER_S, Done, Served, generate
from serve_app.models import load
from serve_app.openai_api.chat import ChatRequest
from serve_app.openai_api.completions import CompletionRequest
from serve_app.openai_api.errors import ApiError
from serve_app.openai_api.tokenize import DetokenizeRequest, TokenizeRequest, detokenize, tokenize
from serve_app.planning import Plan, describe_all, plan_chat, plan_completion
from serve_app.sources import ModelNotFoundError, locate

log = logging.getLogger(__name__)

Generation = ChatRequest | CompletionRequest


class ModelReplica:
    """The model deployment; `app.build` makes it a Serve deployment."""

    def __init__(self, config: ServerConfig) -> None:
        """Start loading; returns at once."""
        self._config = config
        self._session_id = f"server-{str(ULID()).lower()}"
        self._served: Served | None = None
        self._stage = "starting"
        self._failure: str | None = None
        threading.Thread(target=self._load, name="load", daemon=True).start()

    def close(self) -> None:
        """Stop the engine and commit what is pending."""
        if self._served is not None:
            self._served.engine.close()
            self._served.writer.close()

    def __del__(self) -> None:
        self.close()

    def check_health(self) -> None:
        """Tell Serve to restart this replica if its engine has died."""
        if self._served is not None and not self._served.engine.alive:
            raise RuntimeError("the engine's thread has died")

    async def status(self) -> dict[str, Any]:
        """Say how far the start is and, once it is done, what is served."""
        if self._served is None:
            return {"status": "failed" if self._failure else "loading", "stage": self._failure or self._stage}
        model = self._served.model
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

    async def generate(self, request: Generation) -> dict[str, Any]:
        """Answer a request whole: `{"reply": …}` or `{"error": …}`."""
        try:
            served = self._serving()
            plan = self._plan(served, request)
            dones: list[Done | None] = [None] * len(plan.choices)
            async for events in self._run(served, plan, stream=False):
                for index, event in events:
                    if isinstance(event, Done):
                        dones[index] = event
            finished = [done for done in dones if done is not None]
            return {"reply": plan.reply.whole(finished, describe_all(plan, finished))}
        except ApiError as error:
            return {"error": error.payload()}

    async def generate_stream(self, request: Generation) -> AsyncIterator[list[dict[str, Any]]]:
        """Answer a request in pieces: lists of chunks that have come together; an error is a chunk `{"error": …}`.

        The first piece waits for the engine's first word, so that a refusal comes before anything else.
        """
        try:
            served = self._serving()
            plan = self._plan(served, request)
            opening = plan.reply.opening()
            dones: list[Done | None] = [None] * len(plan.choices)
            async for events in self._run(served, plan, stream=True):
                chunks, opening = opening, []
                for index, event in events:
                    if isinstance(event, Done):
                        dones[index] = event
                        chunks += plan.reply.done(index, event)
                    else:
                        chunks += plan.reply.delta(index, event)
                yield chunks
            yield plan.reply.closing(describe_all(plan, [done for done in dones if done is not None]))
        except ApiError as error:
            yield [{"error": error.payload()}]

    async def tokenize(self, request: TokenizeRequest) -> dict[str, Any]:
        """Turn text or messages into tokens: `{"reply": …}` or `{"error": …}`."""
        try:
            model = self._serving().model
            _check_model(request.model, model.source.name)
            return {"reply": tokenize(model, request)}
        except ApiError as error:
            return {"error": error.payload()}

    async def detokenize(self, request: DetokenizeRequest) -> dict[str, Any]:
        """Turn tokens into text: `{"reply": …}` or `{"error": …}`."""
        try:
            model = self._serving().model
            _check_model(request.model, model.source.name)
            return {"reply": detokenize(model, request)}
        except ApiError as error:
            return {"error": error.payload()}

    def _load(self) -> None:
        config = self._config
        try:
            torch.set_num_threads(config.threads or os.cpu_count() or 1)
            writer = StoreWriter(config.store)
            self._say(f"finding {config.model}")
            source = locate(config.model, config.revision)
            model = load(source, config.dtype, config.device, self._say, config.device_map)
            engine = TransformersEngine(
                model,
                max_batch=config.max_batch,
                max_queue=config.max_queue,
                max_prefill_tokens=config.max_prefill_tokens,
                max_cache_tokens=config.max_cache_tokens,
            )
        except (ModelNotFoundError, ResolutionError, StoreError) as error:
            self._failure = str(error)
            log.error("the replica cannot start: %s", error)
        except Exception as error:
            self._failure = f"{type(error).__name__}: {error}"
            log.exception("the replica cannot start")
        else:
            self._served = Served(model, engine, writer)
            self._say("ready")

    def _say(self, stage: str) -> None:
        self._stage = stage
        log.info("%s", stage)

    def _serving(self) -> Served:
        if self._served is None:
            if self._failure:
                raise ApiError(503, f"the model could not be loaded: {self._failure}", code="model_failed")
            raise ApiError(503, f"the model is loading: {self._stage}", code="loading", retry_after_s=RETRY_AFTER_S)
        return self._served

    def _plan(self, served: Served, request: Generation) -> Plan:
        _check_model(request.model, served.model.source.name)
        plan = plan_chat if isinstance(request, ChatRequest) else plan_completion
        return plan(served, request, self._config)  # type: ignore[arg-type]

    def _run(self, served: Served, plan: Plan, *, stream: bool) -> AsyncIterator[list[tuple[int, Any]]]:
        timeout_s = self._config.request_timeout_s
        return generate(served, plan.choices, stream=stream, session_id=self._session_id, timeout_s=timeout_s)


def _check_model(asked: str, served: str) -> None:
    if asked != served:
        raise ApiError(
            404,
            f"model {asked!r} is not served here; this server has {served!r}",
            param="model",
            code="model_not_found",
        )
