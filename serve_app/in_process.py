"""Serves a model that this process has loaded, on loopback and from this process: no Ray Serve, no second copy of the weights.

The routes are the very ones of a server (`http.ingress`), and so is the replica behind them. Only what Ray Serve does between
the two is done here: calls (`_Replica` stands where Serve's handle stands), the HTTP server (uvicorn, on a thread), and the
cancelling of what a client that has left had asked for. What is served is the model as it is: also one whose weights were
changed after they were loaded.
"""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import uvicorn
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.config import ModelChoice, ServerConfig
from serve_app.engines.protocol import Engine
from serve_app.engines.served_model import ServedModel
from serve_app.http.ingress import Ingress
from serve_app.openai_api.errors import ApiError
from serve_app.replica.model_slot import ModelSlot
from serve_app.replica.replica import ModelReplica

POLL_S = 0.01


@contextmanager
def serving_in_process(
    model: ServedModel, engine: Engine, config: ServerConfig, *, host: str, port: int
) -> Iterator[str]:
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
        ingress = Ingress(cast(DeploymentHandle, _Replica(replica)), config, _refuse)
        app = _CancelledWithClient(ingress.__serve_build_asgi_app__())
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None, log_level="critical"))
        thread = threading.Thread(target=server.run, args=([listening],), name="http", daemon=True)
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise OSError(f"no HTTP server could be started on {host}:{port}")
                time.sleep(POLL_S)
            yield f"http://{host}:{listening.getsockname()[1]}/v1"
        finally:
            server.should_exit = server.force_exit = True
            thread.join()
            replica.close()


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


async def _left(read: asyncio.Event, receive: Receive) -> None:
    """Return when the client has left, after its request has been read."""
    await read.wait()
    while (await receive())["type"] != "http.disconnect":
        pass
