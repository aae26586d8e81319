"""A server that a script starts and stops: Ray Serve on this machine, with every route and engine of `roentgen serve`."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from roentgen.api.asking import capture_fields, checked
from roentgen.api_keys import client_key
from roentgen.cluster import LOCAL
from roentgen.contract import ActivationRequest
from roentgen.defaults import EMBEDDED_MODEL, HOST
from roentgen.serving.local_server import serving
from serve_app.config import ServerConfig

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

log = logging.getLogger(__name__)


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


@contextmanager
def serve(
    model: str = EMBEDDED_MODEL,
    *,
    capture: Mapping[str, Any] | bool = True,
    host: str = HOST,
    port: int = 0,
    ray_address: str = LOCAL,
    verbose: bool = False,
    stage: Callable[[str], None] = log.info,
    **options: Any,
) -> Iterator[Server]:
    """Serve a model for as long as a "with" block lasts; then what was started here is gone, also after Ctrl-C.

    Args:
        model: "smollm2-135m" (embedded), a folder, a LoRA adapter's folder, or a hub id.
        capture: what requests will capture, as in `Model.generate`, which is checked at once and is what vLLM taps; True if
            that is not known yet; False if they may not.
        host: the address to listen on; anything but loopback needs ROENTGEN_API_KEY.
        port: 0 chooses a free one.
        ray_address: "local" starts a Ray here; HOST:PORT joins one.
        verbose: show Ray's and the replicas' logs.
        stage: told what is being done.
        options: the other options of `roentgen serve`, as Python spells them: engine, dtype, device, store, max_batch, taps.

    Raises:
        RequestError: if an option is not allowed.
        LaunchError: if the port is taken, the address needs a key, or the model cannot be loaded.
        ClusterError: if no Ray answers at the address.
        StoreError: if the store cannot be written.
    """
    config = checked(ServerConfig, {"model": model, "capture": capture is not False, **options})
    known = checked(ActivationRequest, capture_fields(capture)) if isinstance(capture, Mapping) else None
    running = serving(
        config, host=host, port=port, ray_address=ray_address, stage=stage, verbose=verbose, capture=known
    )
    with running as base_url:
        server = Server(base_url, config)
        try:
            yield server
        finally:
            if "client" in vars(server):
                server.client.close()
