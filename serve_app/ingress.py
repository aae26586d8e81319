"""The HTTP side: routes, keys, and OpenAI's error envelope on every path.

The ingress holds no model. It validates a request's body (unknown parameters are errors), hands it to a replica through the
Serve handle, and turns what comes back into a JSON reply or server-sent events. For a stream it waits for the first piece
before it answers, so that whatever can fail at once fails with an HTTP status instead of inside a 200.
"""

import asyncio
import hmac
import json
import logging
import os
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from roentgen import __version__
from roentgen.store import SessionSummary, StoreError, list_sessions
from roentgen.store.sessions import find_session, summarise
from serve_app.config import ServerConfig
from serve_app.openai_api.chat import ChatRequest
from serve_app.openai_api.errors import ApiError, from_validation

log = logging.getLogger(__name__)

API_KEY_VARIABLE = "ROENTGEN_API_KEY"

Body = dict[str, Any]


def api_keys() -> list[str]:
    """Return the keys that open this server, from the environment; none means that it is open (and on loopback only)."""
    return [key.strip() for key in os.environ.get(API_KEY_VARIABLE, "").split(",") if key.strip()]


def check_key(request: Request) -> None:
    """Refuse a request without a valid key.

    Raises:
        ApiError: 401.
    """
    keys = api_keys()
    given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
    # Every key is compared, each in constant time, so that timing tells nothing.
    matches = [hmac.compare_digest(given, key.encode()) for key in keys]
    if keys and not any(matches):
        raise ApiError(401, "no valid API key; send it as 'Authorization: Bearer KEY'", code="invalid_api_key")


def make_api() -> FastAPI:
    """Return an application without routes that turns every error into the envelope."""
    api = FastAPI(title="Roentgen", version=__version__)

    @api.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers())

    @api.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return await on_api_error(request, from_validation(list(error.errors())))

    @api.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return await on_api_error(request, ApiError(error.status_code, message))

    @api.exception_handler(StoreError)
    async def on_store(request: Request, error: StoreError) -> JSONResponse:
        return await on_api_error(request, ApiError(404, str(error), code="session_not_found"))

    @api.exception_handler(RayError)
    async def on_ray(request: Request, error: RayError) -> JSONResponse:
        log.error("a replica failed: %s", error)
        return await on_api_error(request, ApiError(503, "the model's replica was lost; try again", retry_after_s=2))

    @api.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> JSONResponse:
        return await on_api_error(request, ApiError(500, f"internal error: {type(error).__name__}"))

    return api


class Ingress:
    """The routes; `app.build` makes it a Serve deployment."""

    def __init__(self, model: DeploymentHandle, config: ServerConfig) -> None:
        self._model = model
        self._config = config

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Bind the routes to this object's methods; Serve calls it once per replica. All but `/health` ask for the key."""
        api = make_api()
        api.add_api_route("/health", self.health, methods=["GET"])
        locked = APIRouter(prefix="/v1", dependencies=[Depends(check_key)])
        locked.add_api_route("/models", self.models, methods=["GET"])
        locked.add_api_route("/model/structure", self.structure, methods=["GET"])
        locked.add_api_route("/chat/completions", self.chat, methods=["POST"])
        locked.add_api_route("/activations/sessions", self.sessions, methods=["GET"])
        locked.add_api_route("/activations/session/{session_id}", self.session, methods=["GET"])
        api.include_router(locked)
        return api

    async def health(self) -> JSONResponse:
        """Say whether the model answers, or what stage its start is in; 503 until it is ready."""
        status = await self._model.status.remote()
        code = 200 if status["status"] == "ok" else 503
        return JSONResponse({"status": status["status"], "stage": status["stage"]}, code)

    async def models(self) -> Body:
        """List the served model."""
        return {"object": "list", "data": [(await self._serving())["model"]]}

    async def structure(self) -> Body:
        """Show the model's layers and hook points."""
        structure: Body = (await self._serving())["structure"]
        return structure

    async def chat(self, body: ChatRequest) -> Any:
        """Answer a chat completion, whole or streamed, with activations kept if asked."""
        if body.stream:
            return await self._stream(body)
        response = self._model.chat.remote(body)
        try:
            result: Body = await response
        except asyncio.CancelledError:
            response.cancel()  # the client went away: free its place in the batch
            raise
        if "error" in result:
            raise ApiError.from_payload(result["error"])
        return JSONResponse(result["reply"])

    def sessions(self) -> Body:
        """List the sessions of the activation store."""
        return {"object": "list", "data": [asdict(summary) for summary in list_sessions(self._config.store)]}

    def session(
        self,
        session_id: str,
        offset: Annotated[int, Query(ge=0)] = 0,
        limit: Annotated[int, Query(ge=0, le=10_000)] = 100,
    ) -> Body:
        """Show what a session holds, with a page of its rollouts."""
        try:
            session = find_session(self._config.store, session_id)
        except ValueError as error:
            raise ApiError(400, str(error), param="session_id") from error
        summary: SessionSummary = summarise(session)
        columns = ["rollout_id", "problem_id", "epoch", "turn", "shard", "row_start", "row_stop", "labels"]
        page = session.rollouts().iloc[offset : offset + limit][columns]
        return {**asdict(summary), "offset": offset, "items": json.loads(page.to_json(orient="records"))}

    async def _serving(self) -> Body:
        status: Body = await self._model.status.remote()
        if status["status"] != "ok":
            retry = 2 if status["status"] == "loading" else None
            raise ApiError(
                503, f"the model is not ready: {status['stage']}", code=status["status"], retry_after_s=retry
            )
        return status

    async def _stream(self, body: ChatRequest) -> StreamingResponse:
        pieces = self._model.options(stream=True).chat_stream.remote(body)
        first = await anext(pieces)
        if "error" in first[0]:
            raise ApiError.from_payload(first[0]["error"])

        async def events() -> AsyncIterator[str]:
            try:
                yield _sse(first)
                async for chunks in pieces:
                    yield _sse(chunks)
            except RayError as error:
                # The status is sent already: the failure has to be said inside the stream.
                log.error("a replica failed during a stream: %s", error)
                yield _sse([{"error": ApiError(503, "the model's replica was lost").payload()}])
            finally:
                pieces.cancel()
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")


def _sse(chunks: list[Body]) -> str:
    """Spell chunks as server-sent events; an error becomes the envelope."""
    bodies = [ApiError.from_payload(c["error"]).body() if "error" in c else c for c in chunks]
    return "".join(f"data: {json.dumps(body, ensure_ascii=False)}\n\n" for body in bodies)
