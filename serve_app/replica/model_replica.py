"""A model replica: one copy of the weights, one engine thread, one store writer.

The replica answers as soon as its process runs. It loads the model on a thread (`model_slot`) and reports the stage meanwhile,
so that `/health` can distinguish a slow start from a dead replica. Serve chooses the model: it calls `reconfigure` at the
start, after a restart, and to swap models. A request is rendered and checked here, because only the replica has the
tokenizer. It runs as one or more choices (`requests.generation`), and is acknowledged only after its activations are
committed.

Errors are returned as data (`RequestError.payload`, see `openai_api.errors`), and a request's statistics with its reply
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

LOAD_ID = "load_id"
"""Key of the `user_config` whose value is new for every load, so that Serve calls `reconfigure` again."""

Generation = ChatRequest | CompletionRequest | ResponsesRequest


class ModelReplica:
    """The model deployment; `app.build` makes it a Serve deployment."""

    def __init__(self, config: ServerConfig, slot: ModelSlot | None = None) -> None:
        """Create a replica without a model, unless a slot with one is given; `reconfigure` chooses the model."""
        self._config = config
        self._session_id = f"server-{str(ULID()).lower()}"
        self._name = f"{socket.gethostname()}-{os.getpid()}"
        self._slot = slot or ModelSlot(config)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Start to load a model (a `ModelChoice` as data) in place of the current one; returns at once."""
        choice = {name: value for name, value in user_config.items() if name != LOAD_ID}
        self._slot.choose(ModelChoice.model_validate(choice))

    def restart(self) -> None:
        """Start to reload the same model; returns at once. Used without Serve, which would start another replica."""
        self._slot.reload()

    def close(self) -> None:
        """Stop the engine and commit pending activations."""
        self._slot.close()

    def __del__(self) -> None:
        self.close()

    def check_health(self) -> None:
        """Raise an error if the engine has died, so that Serve restarts this replica."""
        served = self._slot.served
        if served is not None and not served.engine.alive:
            raise RuntimeError("the engine has died")

    def record_routing_stats(self) -> dict[str, bool]:
        """Report to Serve whether this replica is ready (`routing`)."""
        return {"ready": self._slot.ready}

    async def status(self) -> dict[str, Any]:
        """Return the served model and the engine's load, or the stage of loading."""
        served = self._slot.served
        load = served.engine.load if served is not None else Load(0, 0)
        return {**self._slot.status(), "replica": self._name, "load": load}

    async def generate(self, request: Generation, about: str | None = None) -> dict[str, Any]:
        """Generate and return a whole reply: `{"reply": …, "stats": …}` or `{"error": …}`.

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
        except Exception as error:  # noqa: BLE001 - returned as data
            return _error(error)

    async def generate_stream(
        self, request: Generation, about: str | None = None
    ) -> AsyncIterator[list[dict[str, Any]]]:
        """Generate and yield a reply in pieces, each a list of chunks; an error is a chunk `{"error": …}`.

        The first piece waits for the engine's first event, so that a refusal comes before anything else. The last chunk of
        the last piece is `{"stats": …}`, which the ingress keeps.

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
        except Exception as error:  # noqa: BLE001 - returned as data
            yield [_error(error)]

    async def tokenize(self, request: TokenizeRequest) -> dict[str, Any]:
        """Tokenize a text or messages: `{"reply": …}` or `{"error": …}`."""
        return self._answer(request, tokenize)

    async def detokenize(self, request: DetokenizeRequest) -> dict[str, Any]:
        """Convert token ids to text: `{"reply": …}` or `{"error": …}`."""
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
        except Exception as error:  # noqa: BLE001 - returned as data
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
    """Return an error as data; an unexpected error becomes a 500 and is logged with its traceback."""
    if not isinstance(error, RequestError):
        log.error("a request failed unexpectedly", exc_info=error)
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
