"""Who may ask: on every request, before any route.

`roentgen view` serves on loopback. Any page in the browser can send requests there, and a name that a stranger's server
resolves to 127.0.0.1 would even let that page read the answers (DNS rebinding). So the `Host` header has to be this machine's
own name, and a request has to carry a token that only the printed address has: as `?token=`, or as `Authorization: Bearer`.
Under a server, the tokens are its API keys.
"""

import hmac
from collections.abc import Callable, Collection
from urllib.parse import parse_qs

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
        "font-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",  # the address has the token
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Rejects requests without a valid token, for another host, and with methods other than GET and HEAD."""

    def __init__(self, app: ASGIApp, tokens: Callable[[], Collection[str]], *, loopback: bool) -> None:
        """Stand before an application.

        Args:
            app: the application.
            tokens: the valid ones; without any, every request is authorized.
            loopback: whether the server is meant to be reached under a name of this machine only.
        """
        self._app = app
        self._tokens = tokens
        self._loopback = loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refused = self._refused(scope)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            await send(message)

        if refused is None:
            await self._app(scope, receive, guarded)
        else:
            status, why = refused
            await JSONResponse({"error": why}, status)(scope, receive, guarded)

    def _refused(self, scope: Scope) -> tuple[int, str] | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self._loopback and name not in LOOPBACK:
            return 403, f"this page answers at {' and '.join(LOOPBACK)} only"
        if scope["method"] not in ("GET", "HEAD"):
            return 405, "this page is read only"
        tokens = self._tokens()
        scheme, _, bearer = headers.get(b"authorization", "").partition(" ")
        given = [bearer.strip()] if scheme.lower() == "bearer" else []
        given += parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [])
        # Each is compared, in constant time, so that timing tells nothing.
        matches = [hmac.compare_digest(one.encode(), token.encode()) for one in given[:2] for token in tokens]
        if tokens and not any(matches):
            return 401, "the address lacks a valid token: open the one that `roentgen view` printed"
        return None
