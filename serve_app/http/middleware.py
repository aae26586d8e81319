"""Middleware: request ids, metrics and a log line for every request; loopback and body size limits; HEAD.

All of it is plain ASGI, which neither buffers a stream nor hides a disconnect.
"""

import asyncio
import ipaddress
import logging
import time
from contextlib import suppress

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from ulid import ULID

from serve_app.http.metrics import Metrics
from serve_app.logs import request_id
from serve_app.openai_api.errors import ApiError
from serve_app.replica.ray_errors import kind_of
from serve_app.requests.stats import RequestStats

log = logging.getLogger(__name__)

MAX_ID = 128
CLIENT_GONE = 499
"""Status in logs and metrics of a request whose client disconnected before the reply began (nginx uses the same number)."""


class RequestObserver:
    """Gives every request an id (its `X-Request-Id`), measures it, and logs it when it ends.

    Routes store `stats` (a `RequestStats`) and `error_code` in `request.state`.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Serve's proxy adds one if the client sent none, and returns it.
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("utf-8", "replace")
        about = given[:MAX_ID] or f"req-{str(ULID()).lower()}"
        state = scope.setdefault("state", {})
        state["request_id"] = about
        start = time.monotonic()
        status = CLIENT_GONE
        whole = gone = False

        async def receive_from_client() -> Message:
            nonlocal gone
            try:
                message = await receive()
            except Exception as error:
                if kind_of(error) is None:
                    raise
                # Serve receives messages from its proxy, and cancels that when the client disconnects.
                message = {"type": "http.disconnect"}
            gone = gone or message["type"] == "http.disconnect"
            return message

        async def send_to_client(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start" and not gone:
                status = message["status"]
            await send(message)
            whole = message["type"] == "http.response.body" and not message.get("more_body", False)

        self._metrics.began()
        token = request_id.set(about)
        try:
            await self._app(scope, receive_from_client, send_to_client)
        except ClientDisconnect:
            pass  # there is no client to answer
        except Exception:
            status = 500  # an outer handler sends it, see `http_api.make_api`
            raise
        finally:
            seconds = time.monotonic() - start
            route = getattr(scope.get("route"), "path", "none")
            stats: RequestStats | None = state.get("stats")
            self._metrics.ended(route, scope["method"], status, seconds)
            if stats is not None:
                self._metrics.observe(stats)
            log.info("request", extra={"fields": _fields(scope, route, status, seconds, whole, stats)})
            request_id.reset(token)


def _fields(
    scope: Scope, route: str, status: int, seconds: float, whole: bool, stats: RequestStats | None
) -> dict[str, object]:
    fields = {
        "method": scope["method"],
        "route": route,
        "status": status,
        "duration_s": round(seconds, 4),
        "whole": whole,
        "error_code": scope["state"].get("error_code"),
    }
    if stats is None:
        return fields
    return fields | {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.completion_tokens,
        "ttft_s": round(min(choice.first_token_s for choice in stats.choices), 4),
        "session": stats.session,
    }


class HeadAsGet:
    """Answers HEAD on every route that has GET, with GET's headers, without generating the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        sent = asyncio.Event()

        async def headers_only(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                await send({"type": "http.response.body", "body": b""})
                sent.set()

        # Change the scope in place, because `RequestObserver` reads what the routes write into it.
        scope["method"] = "GET"
        answer = asyncio.create_task(_called(self._app, scope, receive, headers_only))
        headers = asyncio.create_task(sent.wait())
        try:
            await asyncio.wait({answer, headers}, return_when=asyncio.FIRST_COMPLETED)
            if sent.is_set():
                answer.cancel()  # a session's archive may be large
            with suppress(asyncio.CancelledError):
                await answer
        finally:
            headers.cancel()
            answer.cancel()
            scope["method"] = "HEAD"


async def _called(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)


class LoopbackOnly:
    """Refuses clients on other machines; a server without an API key uses it, whatever address its proxy listens on.

    The launcher binds such a server only to loopback. But the application may also run under a Serve instance whose proxy
    somebody else has configured.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and not _is_here(scope):
            error = ApiError(
                403,
                "this server has no API key, so it accepts only clients on its own machine",
                code="no_api_key_configured",
            )
            await JSONResponse(error.body(), error.status)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _is_here(scope: Scope) -> bool:
    client = scope.get("client")
    try:
        return client is not None and ipaddress.ip_address(client[0]).is_loopback
    except ValueError:
        return False


class BodyLimit:
    """Refuses a body that is too large: at once if Content-Length says so, else when the limit is exceeded."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        message = f"the body is larger than {self._max_bytes} bytes"
        if not length.isdigit() or int(length) > self._max_bytes:
            error = ApiError(413, message, code="body_too_large")
            await JSONResponse(error.body(), error.status)(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            received = await receive()
            seen += len(received.get("body", b""))
            if seen > self._max_bytes:
                # FastAPI passes this exception on; it turns any other one raised while it reads a body into a 400.
                raise HTTPException(413, message)
            return received

        await self._app(scope, counted, send)
