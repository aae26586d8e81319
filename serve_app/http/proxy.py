"""What stands before Serve's HTTP proxy: it spells headers so that the proxy can read them.

The proxy decodes some headers as UTF-8 (`X-Request-Id` among them) and answers 500 in plain text where one is not, before any
of the application's code runs. HTTP allows other bytes, so they are spelled anew here. Serve finds `middlewares` by an
environment variable, which every process that runs a proxy must have: `roentgen serve` and `cluster/start.sh` set it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "serve_app.http.proxy:middlewares"


class ReadableHeaders:
    """Takes header values that are not UTF-8 for Latin-1, which HTTP once said they are, and passes them on as UTF-8.

    An id that is empty is left out: the proxy then makes one, as for a request without.
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
    """Return what Serve is to put before its proxy."""
    return [Middleware(ReadableHeaders)]


@contextmanager
def named_in_environment() -> Iterator[None]:
    """Name `middlewares` in the environment that a Ray started meanwhile inherits, unless it names others already."""
    if CALLBACK_VARIABLE in os.environ:
        yield
        return
    os.environ[CALLBACK_VARIABLE] = CALLBACK
    try:
        yield
    finally:
        del os.environ[CALLBACK_VARIABLE]
