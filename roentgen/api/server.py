"""`serve`: starts and stops a server from a script.

A model given by name is served as by `roentgen serve`, with every route and engine. A loaded model is served from this process
as it is, with one copy of its weights.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from roentgen.api.model import Model
from roentgen.api.request_building import capture_fields, checked, named
from roentgen.api_keys import client_key
from roentgen.argument_names import naming_arguments
from roentgen.contract import ActivationRequest
from roentgen.defaults import EMBEDDED_MODEL, HOST
from roentgen.serving.local_server import check_host, check_port, serving
from roentgen.store.storage_backends import check_writable, open_folder
from serve_app.config import ServerConfig
from serve_app.openai_api.errors import ApiError

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

log = logging.getLogger(__name__)

SERVER_OPTIONS = frozenset(
    ("cors_origins", "max_body_bytes", "max_inline_bytes", "probes", "request_timeout_s", "store")
)
"""Fields of the server's configuration that do not concern the model or its engine."""


@dataclass(frozen=True)
class Server:
    """A running server."""

    base_url: str
    """The base URL, http://HOST:PORT/v1."""
    config: ServerConfig
    """The server's configuration."""

    @cached_property
    def client(self) -> "OpenAI":
        """A client for the server, of the openai package."""
        from openai import OpenAI

        return OpenAI(base_url=self.base_url, api_key=client_key())

    @cached_property
    def async_client(self) -> "AsyncOpenAI":
        """An asynchronous client for the server."""
        from openai import AsyncOpenAI

        return AsyncOpenAI(base_url=self.base_url, api_key=client_key())


class Serving(AbstractContextManager[Server], AbstractAsyncContextManager[Server]):
    """The context manager that `serve` returns; "with" and "async with" start and stop the server."""

    def __init__(self, start: Callable[[], AbstractContextManager[str]], config: ServerConfig) -> None:
        self._running = start()
        self._config = config
        self._server: Server | None = None

    def __enter__(self) -> Server:
        with naming_arguments():
            self._server = Server(self._running.__enter__(), self._config)
        return self._server

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None and "client" in vars(self._server):
            self._server.client.close()
        self._running.__exit__(kind, error, trace)

    async def __aenter__(self) -> Server:
        entering = asyncio.ensure_future(asyncio.to_thread(self.__enter__))
        try:
            return await asyncio.shield(entering)
        except asyncio.CancelledError:  # the thread continues, so stop the server as soon as it has started
            with suppress(Exception):
                await entering
                await asyncio.to_thread(self.__exit__, None, None, None)
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None and "async_client" in vars(self._server):
            await self._server.async_client.close()
        await asyncio.shield(asyncio.to_thread(self.__exit__, kind, error, trace))


def serve(
    model: str | Path | Model = EMBEDDED_MODEL,
    *,
    capture: Mapping[str, Any] | bool = True,
    host: str = HOST,
    port: int = 0,
    ray_address: str | None = None,
    verbose: bool = False,
    stage: Callable[[str], None] = log.info,
    **options: Any,
) -> Serving:
    """Serve a model within a "with" or "async with" block. Everything it started is stopped at the end, also after Ctrl-C.

    Args:
        model: "smollm2-135m" (embedded), a folder, a LoRA adapter's folder, or a hub id; or a loaded `Model`, which is served
            from this process as it is, without Ray Serve and with one copy of its weights.
        capture: what requests will capture, as in `Model.generate`; it is checked at once, and vLLM taps these hook points.
            True if it is not known yet; False to disable capture.
        host: the address to listen on; any other than loopback requires ROENTGEN_API_KEY.
        port: the port; 0 chooses a free one.
        ray_address: "local" starts Ray here; HOST:PORT joins a cluster; None starts Ray only if it is needed (several
            replicas, a GPU, or vLLM).
        verbose: show the logs of Ray and the replicas.
        stage: called with each stage of the start.
        options: other options of `roentgen serve`, with underscores: engine, dtype, device, store, max_batch, taps. For a
            loaded model, only those that do not concern the model: store, probes, request_timeout_s.

    Raises:
        RequestError: if an option is not allowed.
        LaunchError: if the port is in use, the address requires an API key, or the model cannot be loaded.
        ClusterError: if no Ray cluster answers at the address.
        StoreError: if the store cannot be written.
    """
    known = checked(ActivationRequest, capture_fields(capture)) if isinstance(capture, Mapping) else None
    if isinstance(model, Model):
        if others := sorted(options.keys() - SERVER_OPTIONS):
            raise ApiError(
                400,
                f"{others[0]}: not allowed for a loaded model; allowed are {', '.join(sorted(SERVER_OPTIONS))}",
                param=others[0],
            )
        own = model.config.model_dump(exclude_unset=True) | {"capture": capture is not False, **options}
        config = checked(ServerConfig, own)
        return Serving(lambda: _in_process(model, config, host, port), config)
    config = checked(ServerConfig, {"model": named(model), "capture": capture is not False, **options})
    return Serving(
        lambda: serving(
            config, host=host, port=port, ray_address=ray_address, stage=stage, verbose=verbose, capture=known
        ),
        config,
    )


@contextmanager
def _in_process(model: Model, config: ServerConfig, host: str, port: int) -> Iterator[str]:
    from serve_app.in_process import serving_loaded

    check_host(host)
    check_port(host, port)
    check_writable(open_folder(config.store))
    runner = model._runner
    with serving_loaded(runner.model, runner.engine, config, host=host, port=port) as base_url:
        yield base_url
