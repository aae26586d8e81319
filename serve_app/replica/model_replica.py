"""A model replica: one copy of the weights, one engine thread, one store writer.

The replica answers from the moment its process runs: it loads the model on a thread (`model_slot`) and says meanwhile what it
is doing, so that `/health` can tell a slow start from a dead one. Serve says which model: it calls `reconfigure` at the start,
after a restart, and whenever another is to be served. A request is rendered and checked here (only the replica has the
tokenizer), run as one or more choices (`requests.generation`), and acknowledged only when the activations it asked for are
durable.

Errors leave as data (`RequestError.payload`), see `openai_api.errors`; what a request took leaves beside its reply
(`requests.stats`).
"""

import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

from ulid import ULID

from roentgen.model_names import is_named
from serve_app.config import ModelChoice, ServerConfig
from serve_app.engines.protocol import Load
from serve_app.engines.served_model import ServedModel
from serve_app.engines.storage import Done
from serve_app.errors import RequestError
from serve_app.logs import request_id
from serve_app.models.model_source import ModelSource
from serve_app.openai_api.chat import ChatRequest
from serve_app.openai_api.completions import CompletionRequest
from serve_app.openai_api.errors import ApiError, internal_error
from serve_app.openai_api.responses.request import ResponsesRequest
from serve_app.openai_api.tokenize import DetokenizeRequest, TokenizeRequest, detokenize, tokenize, tokenizer_info
from serve_app.replica.model_slot import ModelSlot
from serve_app.requests.generation import Served, generate
from serve_app.requests.planning import GenerationPlan, describe_all, plan_chat, plan_completion, plan_response
from serve_app.requests.stats import RequestStats

log = logging.getLogger(__name__)

ASKED = "asked"
"""The key of a model's `user_config` that says which asking it is."""

Generation = ChatRequest | CompletionRequest | ResponsesRequest


class ModelReplica:
    """The model deployment; `app.build` makes it a Serve deployment."""

    def __init__(self, config: ServerConfig, slot: ModelSlot | None = None) -> None:
        """Wait to be told which model to load, unless there is a slot that holds one."""
        self._config = config
        self._session_id = f"server-{str(ULID()).lower()}"
        self._name = f"{socket.gethostname()}-{os.getpid()}"
        self._slot = slot or ModelSlot(config)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Start to serve a model (a `ModelChoice` as data), in place of the one there may be; returns at once."""
        choice = {name: value for name, value in user_config.items() if name != ASKED}
        self._slot.choose(ModelChoice.model_validate(choice))

    def restart(self) -> None:
        """Start to load the same model again, where Serve does not start another replica; returns at once."""
        self._slot.reload()

    def close(self) -> None:
        """Stop the engine and commit what is pending."""
        self._slot.close()

    def __del__(self) -> None:
        self.close()

    def check_health(self) -> None:
        """Tell Serve to restart this replica if its engine has died."""
        served = self._slot.served
        if served is not None and not served.engine.alive:
            raise RuntimeError("the engine's thread has died")

    def record_routing_stats(self) -> dict[str, bool]:
        """Tell Serve whether this replica can serve (`routing`)."""
        return {"ready": self._slot.ready}

    async def status(self) -> dict[str, Any]:
        """Say what is served and what there is to do, or how far loading is."""
        served = self._slot.served
        load = served.engine.load if served is not None else Load(0, 0)
        return {**self._slot.status(), "replica": self._name, "load": load}

    async def generate(self, request: Generation, about: str | None = None) -> dict[str, Any]:
        """Answer a request whole: `{"reply": …, "stats": …}` or `{"error": …}`.

        Args:
            request: what to generate.
            about: the request's id, for the logs.
        """
        request_id.set(about)
        try:
            with self._slot.use() as served:
                plan = self._plan(served, request)
                dones: list[Done | None] = [None] * len(plan.choices)
                async for events in self._run(served, plan, stream=False):
                    for index, event in events:
                        if isinstance(event, Done):
                            dones[index] = event
                finished = [done for done in dones if done is not None]
                reply = plan.reply.whole(finished, describe_all(plan, finished))
                return {"reply": reply, "stats": _stats(plan, finished)}
        except Exception as error:  # noqa: BLE001 - it leaves as data
            return _error(error)

    async def generate_stream(
        self, request: Generation, about: str | None = None
    ) -> AsyncIterator[list[dict[str, Any]]]:
        """Answer a request in pieces: lists of chunks that have come together; an error is a chunk `{"error": …}`.

        The first piece waits for the engine's first word, so that a refusal comes before anything else. What the request
        took is the last chunk of the last piece, `{"stats": …}`; the ingress keeps it.

        Args:
            request: what to generate.
            about: the request's id, for the logs.
        """
        request_id.set(about)
        try:
            with self._slot.use() as served:
                plan = self._plan(served, request)
                opening: list[Any] = [*plan.reply.opening()]
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
                finished = [done for done in dones if done is not None]
                closing = plan.reply.closing(describe_all(plan, finished))
                yield [*closing, {"stats": _stats(plan, finished)}]
        except Exception as error:  # noqa: BLE001 - it leaves as data
            yield [_error(error)]

    async def tokenize(self, request: TokenizeRequest) -> dict[str, Any]:
        """Turn text or messages into tokens: `{"reply": …}` or `{"error": …}`."""
        return self._answer(request, tokenize)

    async def detokenize(self, request: DetokenizeRequest) -> dict[str, Any]:
        """Turn tokens into text: `{"reply": …}` or `{"error": …}`."""
        return self._answer(request, detokenize)

    async def tokenizer_info(self) -> dict[str, Any]:
        """Describe the tokenizer: `{"reply": …}` or `{"error": …}`."""
        return self._answer(None, lambda model, _: tokenizer_info(model))

    def _answer(self, request: Any, answer: Callable[[ServedModel, Any], Any]) -> dict[str, Any]:
        try:
            with self._slot.use() as served:
                if request is not None and request.model is not None:
                    _check_model(request.model, served.model.source)
                return {"reply": answer(served.model, request)}
        except Exception as error:  # noqa: BLE001 - it leaves as data
            return _error(error)

    def _plan(self, served: Served, request: Generation) -> GenerationPlan:
        _check_model(request.model, served.model.source)
        match request:
            case ChatRequest():
                return plan_chat(served, request, self._config)
            case CompletionRequest():
                return plan_completion(served, request, self._config)
            case ResponsesRequest():
                return plan_response(served, request, self._config)

    def _run(self, served: Served, plan: GenerationPlan, *, stream: bool) -> AsyncIterator[list[tuple[int, Any]]]:
        timeout_s = self._config.request_timeout_s
        return generate(served, plan.choices, stream=stream, session_id=self._session_id, timeout_s=timeout_s)


def _stats(plan: GenerationPlan, dones: list[Done]) -> RequestStats:
    prompts = {id(choice.prompt): len(choice.prompt.token_ids) for choice in plan.choices}
    return RequestStats.of(dones, sum(prompts.values()))


def _error(error: Exception) -> dict[str, Any]:
    """Return an error as data; one that nobody expected is a 500, and logged with where it came from."""
    if not isinstance(error, RequestError):
        log.error("a request failed in a way that was not expected", exc_info=error)
        error = internal_error(error)
    if error.status >= 500:
        log.error("%s", error.message)
    return {"error": error.payload()}


def _check_model(asked: str, served: ModelSource) -> None:
    if not is_named(asked, served.names):
        raise ApiError(
            404,
            f"model {asked!r} is not served here; this server has {served.name!r}",
            param="model",
            code="model_not_found",
        )
