"""What every route has in common: the error envelope, keys, request ids and the size of a body.

FastAPI's own errors (an unknown route, an invalid body) become OpenAI's envelope too, and never 422: OpenAI's clients know
400. The middleware is plain ASGI, so that it neither buffers a stream nor hides a disconnect.
"""

import hmac
import logging
import os
import re

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from ulid import ULID

from roentgen import __version__
from roentgen.store import StoreError
from serve_app.openai_api.errors import ApiError, from_validation

log = logging.getLogger(__name__)

API_KEY_VARIABLE = "ROENTGEN_API_KEY"
REQUEST_ID = "X-Request-Id"


def api_keys() -> list[str]:
    """Return the keys that open this server, from the environment; none means that it is open (and on loopback only)."""
    return [key.strip() for key in os.environ.get(API_KEY_VARIABLE, "").split(",") if key.strip()]


def check_key(request: Request) -> None:
    """Refuse a request without a valid key.

    Raises:
        ApiError: 401.
    """
    keys = api_keys()
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Every key is compared, each in constant time, so that timing tells nothing.
    matches = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in keys]
    if keys and not (scheme.lower() == "bearer" and any(matches)):
        raise ApiError(401, "no valid API key; send it as 'Authorization: Bearer KEY'", code="invalid_api_key")


def make_api(max_body_bytes: int) -> FastAPI:
    """Return an application without routes that turns every error into the envelope.

    Args:
        max_body_bytes: the largest body it reads; beyond, 413.
    """
    api = FastAPI(title="Roentgen", version=__version__)
    api.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    api.add_middleware(RequestIds)

    @api.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers())

    @api.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return await on_api_error(request, from_validation(list(error.errors())))

    @api.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(ApiError(error.status_code, message).body(), error.status_code, error.headers)

    @api.exception_handler(StoreError)
    async def on_store(request: Request, error: StoreError) -> JSONResponse:
        return await on_api_error(request, ApiError(404, str(error), code="session_not_found"))

    @api.exception_handler(BackPressureError)
    async def on_backpressure(request: Request, error: BackPressureError) -> JSONResponse:
        return await on_api_error(request, ApiError(429, "the server is busy", code="busy", retry_after_s=2))

    @api.exception_handler(RayError)
    async def on_ray(request: Request, error: RayError) -> JSONResponse:
        log.error("a replica failed: %s", error)
        return await on_api_error(request, ApiError(503, "the model's replica was lost; try again", retry_after_s=2))

    @api.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> JSONResponse:
        return await on_api_error(request, ApiError(500, f"internal error: {type(error).__name__}"))

    return api


class RequestIds:
    """Gives every request an id: the client's `X-Request-Id` if it has a safe one, else a new one; it is sent back."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(REQUEST_ID.lower().encode(), b"").decode("latin-1")
        request_id = given if re.fullmatch(r"[A-Za-z0-9._-]{1,128}", given) else f"req-{str(ULID()).lower()}"
        scope.setdefault("state", {})["request_id"] = request_id

        async def tagged(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (REQUEST_ID.lower().encode(), request_id.encode())]
            await send(message)

        await self._app(scope, receive, tagged)


class BodyLimit:
    """Refuses a body that is too large: at once if its length is said, else as soon as it has come."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        said = dict(scope["headers"]).get(b"content-length", b"0")
        error = ApiError(413, f"the body is larger than {self._max_bytes} bytes", code="body_too_large")
        if not said.isdigit() or int(said) > self._max_bytes:
            await JSONResponse(error.body(), error.status)(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._max_bytes:
                raise error
            return message

        await self._app(scope, counted, send)
