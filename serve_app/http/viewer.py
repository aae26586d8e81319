"""`/view`: the page of `roentgen view`, over the server's store and the runs in the folders that it was told.

It is an application of its own (`roentgen.view`), which nothing else of the server knows. It is imported at the first request,
so that a server that nobody looks at has neither DuckDB nor a table in memory. The page asks with the server's keys.
"""

from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from roentgen.api_keys import api_keys


class Viewer:
    """The page, made at the first request."""

    def __init__(self, addresses: Sequence[str]) -> None:
        """Show what is at some addresses.

        Args:
            addresses: the store, and folders of runs.
        """
        self._addresses = tuple(addresses)
        self._app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if self._app is None:
            from roentgen.view.app import make_app
            from roentgen.view.library import Library

            self._app = make_app(Library(self._addresses), api_keys, loopback=not api_keys())
        await self._app(scope, receive, send)
