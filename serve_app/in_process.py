"""Serves one replica from this process, without Ray Serve: for a model that a script has loaded, or for one CPU.

The routes (`http.ingress`) and the replica are the same as with Ray Serve. This module replaces what Ray Serve does between
them: method calls (`_Replica` replaces Serve's handle), the HTTP server (uvicorn, on a thread), cancellation when a client
disconnects, and restarting after the engine has died. A loaded model is served as it is, including weights that were changed
after loading, without a second copy of them.
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
"""Seconds between two health checks of the engine, the same as Serve's (`app`)."""

KEEP_ALIVE_S = 90
"""Seconds that an idle connection stays open, the same as Serve's proxy: longer than clients keep theirs."""


@contextmanager
def serving_loaded(model: ServedModel, engine: Engine, config: ServerConfig, *, host: str, port: int) -> Iterator[str]:
    """Serve a loaded model within a context; yields the base URL. The caller closes the engine.

    Args:
        model: the model.
        engine: runs it.
        config: the server's configuration; its settings of the model have no effect.
        host: the address to listen on.
        port: the port; 0 chooses a free one.

    Raises:
        OSError: if the address is in use.
        StoreError: if the store cannot be written.
    """
    with socket.create_server((host, port)) as listening:
        replica = ModelReplica(config, ModelSlot.holding(config, model, engine))
        with _answering(replica, config, _refuse, listening) as base_url:
            yield base_url


@contextmanager
def serving_replica(config: ServerConfig, *, host: str, port: int) -> Iterator[str]:
    """Serve a configured model within a context; yields the base URL at once, while `/health` reports the load's progress.

    Raises:
        OSError: if the address is in use.
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
    """Serve HTTP requests with a replica in this process; close the replica at the end."""
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
                    raise OSError(f"the HTTP server did not start on {host}:{port}")
                time.sleep(POLL_S)
            yield f"http://{host}:{port}/v1"
        finally:
            server.should_exit = server.force_exit = True
            thread.join()
    finally:
        replica.close()


def _watch(replica: ModelReplica, over: threading.Event, every_s: float = WATCH_S) -> None:
    """Reload the model whenever its engine has died."""
    while not over.wait(every_s):
        try:
            replica.check_health()
        except RuntimeError as error:
            log.error("%s; reloading the model", error)
            replica.restart()


def _refuse(choice: ModelChoice) -> None:
    raise ApiError(
        403, f"model_id: {choice.model_id!r} cannot replace a model that a script has loaded", code="model_not_allowed"
    )


class _Replica:
    """Calls a replica in this process, with the interface of Serve's handle."""

    def __init__(self, replica: ModelReplica) -> None:
        self._replica = replica

    def __getattr__(self, name: str) -> "_Method":
        return _Method(getattr(self._replica, name))

    def options(self, *, stream: bool) -> "_Replica":
        return self  # a streaming method is an async generator anyway

    def broadcast(self, name: str) -> "_Broadcast":
        return _Broadcast(getattr(self._replica, name)())


class _Method:
    """A method of a replica, as an attribute of Serve's handle."""

    def __init__(self, method: Any) -> None:
        self._method = method

    def remote(self, *args: Any) -> Any:
        """Call the method; return a task, or an iterator over a stream's pieces. Both can be cancelled."""
        called = self._method(*args)
        return asyncio.ensure_future(called) if asyncio.iscoroutine(called) else _Pieces(called)


class _Pieces:
    """An iterator over a stream's pieces that can be cancelled."""

    def __init__(self, pieces: AsyncIterator[Any]) -> None:
        self._pieces = pieces
        self._next: asyncio.Task[Any] | None = None

    def __aiter__(self) -> "_Pieces":
        return self

    async def __anext__(self) -> Any:
        self._next = asyncio.ensure_future(cast(Coroutine[Any, Any, Any], anext(self._pieces)))
        return await self._next

    def cancel(self) -> None:
        """Stop the stream, and cancel its generation in the engine."""
        if self._next is not None:
            self._next.cancel()


class _Broadcast:
    """A call to every replica; here there is only one."""

    def __init__(self, call: Coroutine[Any, Any, Any]) -> None:
        self._call = call

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        """Return the results, in a list of one."""
        async with asyncio.timeout(timeout_s):
            return list(await asyncio.gather(self._call, return_exceptions=return_exceptions))


class _CancelledWithClient:
    """Cancels a request whose client disconnects before the reply is complete, as Serve's proxy does."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        read, whole = asyncio.Event(), False

        async def receive_request() -> Message:
            message = await receive()
            if not message.get("more_body", False):
                read.set()
            return message

        async def send_reply(message: Message) -> None:
            nonlocal whole
            whole = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        answering = asyncio.ensure_future(
            cast(Coroutine[Any, Any, None], self._app(scope, receive_request, send_reply))
        )
        watching = asyncio.ensure_future(_disconnected(read, receive))
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
    """Adds an `X-Request-Id` to a request without one, and returns it in the reply, as Serve's proxy does."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = b"x-request-id"
        given = dict(scope.get("headers", ())).get(name)
        about = given if given is not None else str(uuid.uuid4()).encode()
        if given is None and "headers" in scope:
            scope = {**scope, "headers": [*scope["headers"], (name, about)]}

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (name, about)]}
            await send(message)

        await self._app(scope, receive, send_with_id)


async def _disconnected(read: asyncio.Event, receive: Receive) -> None:
    """Wait until the request has been read and the client has disconnected."""
    await read.wait()
    while (await receive())["type"] != "http.disconnect":
        pass
