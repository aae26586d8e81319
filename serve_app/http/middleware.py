"""What happens around every request: an id, a measurement and a line in the log; and limits on who may send how much.

All of it is plain ASGI, so that it neither buffers a stream nor hides a disconnect.
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
"""What the log and the metrics call a request whose client left before an answer began (the web server nginx's number)."""


class RequestObserver:
    """Knows every request by an id (its `X-Request-Id`), measures it, and logs it at its end.

    Routes leave what they know in `request.state`: `stats` (a `RequestStats`) and `error_code`.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Serve's proxy has given it one if the client has not, and sends it back.
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("utf-8", "replace")
        about = given[:MAX_ID] or f"req-{str(ULID()).lower()}"
        state = scope.setdefault("state", {})
        state["request_id"] = about
        start = time.monotonic()
        status = CLIENT_GONE
        whole = gone = False

        async def heard() -> Message:
            nonlocal gone
            try:
                message = await receive()
            except Exception as error:
                if kind_of(error) is None:
                    raise
                # Serve fetches what the client sends from its proxy, and cancels that when the client has left.
                message = {"type": "http.disconnect"}
            gone = gone or message["type"] == "http.disconnect"
            return message

        async def watched(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start" and not gone:
                status = message["status"]
            await send(message)
            whole = message["type"] == "http.response.body" and not message.get("more_body", False)

        self._metrics.began()
        token = request_id.set(about)
        try:
            await self._app(scope, heard, watched)
        except ClientDisconnect:
            pass  # nobody is there to be told
        except Exception:
            status = 500  # sent further out, see `http_api.make_api`
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
    """Answers HEAD on every route that has GET: with the headers of what GET would send, and without making the rest of it."""

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

        # In place: what the routes write into the scope is for `RequestObserver`, too.
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
    """Refuses every client on another machine: what a server without a key does, however its proxy is bound.

    The launcher refuses to bind such a server to anything but loopback; but whoever runs the application under a Serve of their
    own binds the proxy themselves, where this code cannot see it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and not _is_here(scope):
            error = ApiError(
                403, "this server has no API key, so it answers only on its own machine", code="no_api_key_configured"
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
        message = f"the body is larger than {self._max_bytes} bytes"
        if not said.isdigit() or int(said) > self._max_bytes:
            error = ApiError(413, message, code="body_too_large")
            await JSONResponse(error.body(), error.status)(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            received = await receive()
            seen += len(received.get("body", b""))
            if seen > self._max_bytes:
                # FastAPI passes this kind on; any other that comes while it reads a body is a 400 to it.
                raise HTTPException(413, message)
            return received

        await self._app(scope, counted, send)
