"""Serves one replica from this process, without Ray Serve: a model that a script has loaded, or all that one CPU needs.

The routes are the very ones of a server (`http.ingress`), and so is the replica behind them. Only what Ray Serve does between
the two is done here: calls (`_Replica` stands where Serve's handle stands), the HTTP server (uvicorn, on a thread), the
cancelling of what a client that has left had asked for, and the watch over an engine that dies. A loaded model is served as it
is: also one whose weights were changed after they were loaded, and there is no second copy of them.
"""

import asyncio
import logging
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, cast

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.config import ModelChoice, ServerConfig
from serve_app.engines.protocol import Engine
from serve_app.engines.served_model import ServedModel
from serve_app.http.ingress import Ingress
from serve_app.http.proxy import ReadableHeaders
from serve_app.openai_api.errors import ApiError
from serve_app.replica.model_replica import ModelReplica
from serve_app.replica.model_slot import ModelSlot

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

log = logging.getLogger(__name__)

POLL_S = 0.01

WATCH_S = 3.0
"""Seconds between two looks at the engine, as many as Serve waits between its own (`app`)."""

KEEP_ALIVE_S = 90
"""How long a connection without requests stays open, as with Serve's proxy: longer than clients keep theirs."""


@contextmanager
def serving_loaded(model: ServedModel, engine: Engine, config: ServerConfig, *, host: str, port: int) -> Iterator[str]:
    """Serve a loaded model for as long as the context lasts; yields the base URL. The engine stays its owner's.

    Args:
        model: the model.
        engine: runs it.
        config: the server's; what it says of the model has no effect.
        host: the address to listen on.
        port: the port; 0 for a free one.

    Raises:
        OSError: if the address is taken.
        StoreError: if the store cannot be written.
    """
    with socket.create_server((host, port)) as listening:
        replica = ModelReplica(config, ModelSlot.holding(config, model, engine))
        with _answering(replica, config, _refuse, listening) as base_url:
            yield base_url


@contextmanager
def serving_replica(config: ServerConfig, *, host: str, port: int) -> Iterator[str]:
    """Serve what a configuration says; yields the base URL at once, where `/health` says how far the model's loading is.

    Raises:
        OSError: if the address is taken.
    """
    with socket.create_server((host, port)) as listening:
        replica = ModelReplica(config)

        def choose(choice: ModelChoice) -> None:
            replica.reconfigure(choice.model_dump(mode="json"))

        choose(config.choice)
        over = threading.Event()
        watching = threading.Thread(target=_watch, args=(replica, over), name="watch", daemon=True)
        watching.start()
        try:
            with _answering(replica, config, choose, listening) as base_url:
                yield base_url
        finally:
            over.set()
            watching.join()


@contextmanager
def _answering(
    replica: ModelReplica, config: ServerConfig, redeploy: Callable[[ModelChoice], None], listening: socket.socket
) -> Iterator[str]:
    """Answer requests from a replica of this process, and close it in the end."""
    try:
        ingress = Ingress(cast("DeploymentHandle", _Replica(replica)), config, redeploy)
        app = ReadableHeaders(_Numbered(_CancelledWithClient(ingress.__serve_build_asgi_app__())))
        server = uvicorn.Server(
            uvicorn.Config(app, lifespan="off", log_config=None, log_level="critical", timeout_keep_alive=KEEP_ALIVE_S)
        )
        thread = threading.Thread(target=server.run, args=([listening],), name="http", daemon=True)
        thread.start()
        host, port = listening.getsockname()[:2]
        try:
            while not server.started:
                if not thread.is_alive():
                    raise OSError(f"no HTTP server could be started on {host}:{port}")
                time.sleep(POLL_S)
            yield f"http://{host}:{port}/v1"
        finally:
            server.should_exit = server.force_exit = True
            thread.join()
    finally:
        replica.close()


def _watch(replica: ModelReplica, over: threading.Event, every_s: float = WATCH_S) -> None:
    """Load the model again when its engine has died."""
    while not over.wait(every_s):
        try:
            replica.check_health()
        except RuntimeError as error:
            log.error("%s; the model is loaded again", error)
            replica.restart()


def _refuse(choice: ModelChoice) -> None:
    raise ApiError(
        403, f"model_id: {choice.model_id!r} cannot take the place of a script's own model", code="model_not_allowed"
    )


class _Replica:
    """Calls a replica in this process, as Serve's handle calls one elsewhere."""

    def __init__(self, replica: ModelReplica) -> None:
        self._replica = replica

    def __getattr__(self, name: str) -> "_Method":
        return _Method(getattr(self._replica, name))

    def options(self, *, stream: bool) -> "_Replica":
        return self  # a method that streams is one that yields

    def broadcast(self, name: str) -> "_Broadcast":
        return _Broadcast(getattr(self._replica, name)())


class _Method:
    """One method of a replica."""

    def __init__(self, method: Any) -> None:
        self._method = method

    def remote(self, *args: Any) -> Any:
        """Call it: a task to wait for, or the pieces of a stream; either can be cancelled."""
        called = self._method(*args)
        return asyncio.ensure_future(called) if asyncio.iscoroutine(called) else _Pieces(called)


class _Pieces:
    """A stream's pieces."""

    def __init__(self, pieces: AsyncIterator[Any]) -> None:
        self._pieces = pieces
        self._next: asyncio.Task[Any] | None = None

    def __aiter__(self) -> "_Pieces":
        return self

    async def __anext__(self) -> Any:
        self._next = asyncio.ensure_future(cast(Coroutine[Any, Any, Any], anext(self._pieces)))
        return await self._next

    def cancel(self) -> None:
        """Stop the stream; what it has asked of the engine is cancelled with it."""
        if self._next is not None:
            self._next.cancel()


class _Broadcast:
    """A question to every replica; there is one."""

    def __init__(self, asked: Coroutine[Any, Any, Any]) -> None:
        self._asked = asked

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        """Return the answers."""
        async with asyncio.timeout(timeout_s):
            return list(await asyncio.gather(self._asked, return_exceptions=return_exceptions))


class _CancelledWithClient:
    """Cancels a request whose client has left before its answer is whole, as Serve's proxy does."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        read, whole = asyncio.Event(), False

        async def heard() -> Message:
            message = await receive()
            if not message.get("more_body", False):
                read.set()
            return message

        async def said(message: Message) -> None:
            nonlocal whole
            whole = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        answering = asyncio.ensure_future(cast(Coroutine[Any, Any, None], self._app(scope, heard, said)))
        watching = asyncio.ensure_future(_left(read, receive))
        try:
            await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not whole:
                answering.cancel()
            with suppress(asyncio.CancelledError):
                await answering
        finally:
            answering.cancel()
            watching.cancel()


class _Numbered:
    """Gives a request without an `X-Request-Id` one, and sends it back, as Serve's proxy does."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = b"x-request-id"
        given = dict(scope.get("headers", ())).get(name)
        about = given if given is not None else str(uuid.uuid4()).encode()
        if given is None and "headers" in scope:
            scope = {**scope, "headers": [*scope["headers"], (name, about)]}

        async def said(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (name, about)]}
            await send(message)

        await self._app(scope, receive, said)


async def _left(read: asyncio.Event, receive: Receive) -> None:
    """Return when the client has left, after its request has been read."""
    await read.wait()
    while (await receive())["type"] != "http.disconnect":
        pass
