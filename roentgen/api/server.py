"""A server that a script starts and stops.

A model's name is served as `roentgen serve` does, with every route and engine. A model that the script has loaded is served
from this process, as it is: there is one copy of its weights.
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

BESIDE_A_MODEL = frozenset(
    ("cors_origins", "max_body_bytes", "max_inline_bytes", "probes", "request_timeout_s", "store")
)
"""Fields of the server's configuration that say nothing of the model or its engine."""


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    base_url: str
    """Where, http://HOST:PORT/v1."""
    config: ServerConfig
    """What it was started with."""

    @cached_property
    def client(self) -> "OpenAI":
        """A client of the openai package for it."""
        from openai import OpenAI

        return OpenAI(base_url=self.base_url, api_key=client_key())

    @cached_property
    def async_client(self) -> "AsyncOpenAI":
        """The same, for coroutines."""
        from openai import AsyncOpenAI

        return AsyncOpenAI(base_url=self.base_url, api_key=client_key())


class Serving(AbstractContextManager[Server], AbstractAsyncContextManager[Server]):
    """What `serve` returns: "with" or "async with" starts the server, and stops it."""

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
        except asyncio.CancelledError:  # the thread goes on: what it starts is stopped as soon as it is there
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
    """Serve a model for as long as a "with" or an "async with" block lasts; then what was started is gone, also after Ctrl-C.

    Args:
        model: "smollm2-135m" (embedded), a folder, a LoRA adapter's folder, or a hub id; or a loaded `Model`, which is served
            from this process as it is, without Ray Serve and with one copy of its weights.
        capture: what requests will capture, as in `Model.generate`, which is checked at once and is what vLLM taps; True if
            that is not known yet; False if they may not.
        host: the address to listen on; anything but loopback needs ROENTGEN_API_KEY.
        port: 0 chooses a free one.
        ray_address: "local" starts a Ray here; HOST:PORT joins one; None starts one where it is needed: for several replicas,
            on a GPU, with vLLM.
        verbose: show Ray's and the replicas' logs.
        stage: told what is being done.
        options: the other options of `roentgen serve`, as Python spells them: engine, dtype, device, store, max_batch, taps. Of
            a loaded model, those that say nothing of the model: store, probes, request_timeout_s.

    Raises:
        RequestError: if an option is not allowed.
        LaunchError: if the port is taken, the address needs a key, or the model cannot be loaded.
        ClusterError: if no Ray answers at the address.
        StoreError: if the store cannot be written.
    """
    known = checked(ActivationRequest, capture_fields(capture)) if isinstance(capture, Mapping) else None
    if isinstance(model, Model):
        if others := sorted(options.keys() - BESIDE_A_MODEL):
            raise ApiError(
                400,
                f"{others[0]}: the model is loaded already; allowed are {', '.join(sorted(BESIDE_A_MODEL))}",
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
