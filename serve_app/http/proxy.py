"""Middleware for Serve's HTTP proxy that re-encodes request headers as UTF-8.

The proxy decodes some headers as UTF-8, `X-Request-Id` among them. If one is not valid UTF-8, it answers 500 in plain text
before any of the application's code runs. HTTP allows other bytes, so they are re-encoded here. Serve finds `middlewares`
through an environment variable, which every process that runs a proxy needs; `roentgen serve` and `cluster/start.sh` set it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "serve_app.http.proxy:middlewares"


class ReadableHeaders:
    """Re-encodes header values that are not UTF-8 from Latin-1, HTTP's historic encoding, to UTF-8.

    It drops an empty request id, so that the proxy generates one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if "headers" in scope:
            given = scope["headers"]
            headers = [(name, _as_utf8(value)) for name, value in given if value.strip() or name != b"x-request-id"]
            scope = {**scope, "headers": headers}
        await self._app(scope, receive, send)


def _as_utf8(value: bytes) -> bytes:
    try:
        value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1").encode()
    return value


def middlewares() -> list[Middleware]:
    """Return the middleware for Serve's proxy."""
    return [Middleware(ReadableHeaders)]


@contextmanager
def named_in_environment() -> Iterator[None]:
    """Set the environment variable for a Ray that starts within the context, unless it is already set."""
    if CALLBACK_VARIABLE in os.environ:
        yield
        return
    os.environ[CALLBACK_VARIABLE] = CALLBACK
    try:
        yield
    finally:
        del os.environ[CALLBACK_VARIABLE]
