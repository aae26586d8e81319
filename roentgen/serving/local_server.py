"""Runs the server, in this process or on Ray Serve, and takes away what it started.

`serving(config, …)` is the one way in: a context manager that yields the base URL once the model answers. On leaving, also
after an error or Ctrl-C, the server is gone, and so are the Serve application it deployed and the Ray it started.

One replica on a CPU needs no Ray: this process serves it, which starts in half the time. Several replicas, GPUs and vLLM are
Ray Serve's, on a Ray that is started here or on one that is given.
"""

import ipaddress
import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from httpx2 import Client, TransportError

from roentgen.api_keys import api_keys
from roentgen.contract import LAYER_HOOK_POINTS, stored_key
from roentgen.defaults import HOST
from roentgen.errors import RoentgenError
from roentgen.http_client import LAST_PORT
from roentgen.ray_connection import LOCAL, connected
from roentgen.serving.preflight import Capture, PreflightError, check_start
from roentgen.store.storage_backends import check_writable, open_folder
from serve_app.config import ServerConfig
from serve_app.http.proxy import named_in_environment
from serve_app.logs import write_json_logs

log = logging.getLogger(__name__)

APP_NAME = "roentgen"
START_TIMEOUT_S = 1800
"""A first start may download a model."""
STOP_TIMEOUT_S = 30


class LaunchError(RoentgenError):
    """The server could not be started; the message says why and what to do."""


@contextmanager
def serving(
    config: ServerConfig,
    *,
    host: str = HOST,
    port: int = 0,
    ray_address: str | None = None,
    stage: Callable[[str], None] = log.info,
    verbose: bool = False,
    capture: Capture | None = None,
) -> Iterator[str]:
    """Serve a model; yields the base URL, such as `http://127.0.0.1:8000/v1`.

    Args:
        config: the server's configuration.
        host: address to bind to; anything but loopback needs an API key in the environment.
        port: 0 chooses a free one.
        ray_address: "local" starts a Ray here; HOST:PORT joins one that runs; None starts one unless this process is enough.
        stage: told what is being done.
        verbose: let Ray's and the replicas' logs through.
        capture: what the server is going to be asked to capture, if that is known; vLLM taps this, unless the
            configuration says what it taps.

    Raises:
        LaunchError: if the port is taken, the address needs a key, or the model cannot be loaded.
        ClusterError: if no Ray answers at the address.
        StoreError: if the store is not writable.
    """
    check_host(host)
    check_port(host, port)
    port = port or free_port(host)
    stage(f"finding {config.model}")
    if capture is not None and "taps" not in config.model_fields_set:
        config = config.model_copy(update={"taps": taps_for(capture)})
    if ray_address in (None, LOCAL):  # on another machine, what is there is for the replica to find out
        try:
            check_start(config, capture)
        except PreflightError as error:
            raise LaunchError(str(error)) from error
    check_writable(open_folder(config.store))

    with ExitStack() as stack:
        if ray_address is None and is_enough(config):
            stage("starting the server")
            stack.enter_context(_in_this_process(config, host, port, verbose))
        else:
            stage("starting Ray" if ray_address in (None, LOCAL) else f"joining Ray at {ray_address}")
            with named_in_environment():
                stack.enter_context(connected(ray_address or LOCAL, verbose=verbose))
            stack.enter_context(_application(config, host, port, stage, verbose))
        base = f"http://{host}:{port}"
        wait_until_ready(base, stage)
        yield f"{base}/v1"


def is_enough(config: ServerConfig) -> bool:
    """Whether one process without Ray can serve a configuration as well as Ray Serve would: one replica, on a CPU."""
    copies = max(config.num_replicas, config.max_replicas, config.num_ingresses)
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    return copies == 1 and on_cpu and config.engine != "vllm"


@contextmanager
def _in_this_process(config: ServerConfig, host: str, port: int, verbose: bool) -> Iterator[None]:
    """Serve from this process; on leaving, stop."""
    from serve_app.in_process import serving_replica

    if verbose:
        write_json_logs()
    with serving_replica(config, host=host, port=port):
        yield


def taps_for(capture: Capture) -> tuple[str, ...]:
    """Return what vLLM has to tap for a capture: hook points, in the layers asked for where those are counted from 0."""
    layers = capture.layers
    if layers == "all" or any(layer < 0 for layer in layers):
        return capture.hook_points
    return tuple(
        tap
        for name in capture.hook_points
        for tap in ([stored_key(name, layer) for layer in layers] if name in LAYER_HOOK_POINTS else [name])
    )


@contextmanager
def _application(
    config: ServerConfig, host: str, port: int, stage: Callable[[str], None], verbose: bool
) -> Iterator[None]:
    """Deploy the Serve application on the Ray that this process is connected to; on leaving, take it away."""
    from ray import serve
    from ray.serve.config import HTTPOptions

    from serve_app.app import build

    logging.getLogger("ray.serve").setLevel(logging.INFO if verbose else logging.ERROR)
    stage("starting Ray Serve")
    found_serve = _found_serve(port)
    with _startable():
        serve.start(http_options=HTTPOptions(host=host, port=port))
    try:
        with _startable():
            serve.run(build(config), name=APP_NAME, route_prefix="/", blocking=False)
        yield
    finally:
        stage("stopping the server")
        serve.delete(APP_NAME)
        if not found_serve:  # of someone's cluster, only what was started here is stopped
            # Also where Ray ends next: Serve would otherwise look for this one's controller when it is started again.
            _end_controller()
            serve.shutdown()


def _found_serve(port: int) -> bool:
    """Return whether Serve runs on this Ray already, for others.

    Raises:
        LaunchError: if it serves a model of ours, whose place another one would take, or does not listen at the port.
    """
    from ray import serve
    from ray.serve.context import _get_global_client

    running = serve.status()
    if APP_NAME in running.applications:
        raise LaunchError(
            "this Ray serves a model already, and one Ray serves one at a time: ask that server, end it, or start this one "
            "without --ray-address, or from a process of its own with --ray-address local"
        )
    if running.proxies and (client := _get_global_client()) is not None and client.http_config.port != port:
        taken = client.http_config.port
        raise LaunchError(
            f"--port {port}: Ray Serve listens at {taken} on this Ray, for others too; take --port {taken}"
        )
    return bool(running.proxies)


def _end_controller() -> None:
    """Have Serve's controller end itself and all that it runs, without the call being tried again when it is gone.

    `serve.shutdown` alone leaves that to Ray, which then tells the terminal that a task failed and is tried for ever.
    """
    import ray
    from ray.exceptions import RayActorError

    try:
        controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        ray.get(controller.graceful_shutdown.options(max_task_retries=0).remote(), timeout=STOP_TIMEOUT_S)
    except (ValueError, TimeoutError, RayActorError):  # it is not there, takes long, or is gone as it should be
        return


@contextmanager
def _startable() -> Iterator[None]:
    """Say in one line that Serve did not start, as on a machine that is too busy for it."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        yield
    except (RayError, RayServeException, TimeoutError) as error:
        raise LaunchError(f"Ray Serve could not be started: {error}") from error


def check_host(host: str) -> None:
    """Refuse an address that others can reach, unless an API key is set.

    Raises:
        LaunchError: naming both ways out.
    """
    loopback = host == "localhost" or _is_loopback(host)
    if not loopback and not api_keys():
        raise LaunchError(
            f"--host {host} can be reached by others and no API key is set: set ROENTGEN_API_KEY, or bind to {HOST}"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def free_port(host: str) -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def check_port(host: str, port: int) -> None:
    """Make sure that nothing listens on a port; 0 stands for one that is free.

    Raises:
        LaunchError: naming the port.
    """
    if not 0 <= port <= LAST_PORT:
        raise LaunchError(f"--port {port} is no port; allowed are 1 to {LAST_PORT}, or 0 for any free one")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise LaunchError(
                f"--port {port}: {error.strerror or error}; choose another, or 0 for any free one"
            ) from error


def wait_until_ready(base: str, stage: Callable[[str], None], timeout_s: float = START_TIMEOUT_S) -> None:
    """Wait until `/health` says that the model answers, passing its stages on.

    Raises:
        LaunchError: if the model cannot be loaded, or nothing answers in time.
    """
    deadline = time.monotonic() + timeout_s
    last = ""
    with Client(timeout=10) as client:
        while time.monotonic() < deadline:
            status = _health(client, base)
            if status["status"] == "ok":
                return
            if status["status"] == "failed":
                raise LaunchError(status["stage"])
            if status["stage"] != last:
                last = status["stage"]
                stage(last)
            time.sleep(0.2)
    raise LaunchError(f"{base}/health was not ready after {timeout_s:.0f} s; its last stage was: {last}")


def _health(client: Client, base: str) -> dict[str, str]:
    try:
        answer = client.get(f"{base}/health")
    except TransportError:
        return {"status": "loading", "stage": "starting the proxy"}
    if answer.is_success or (answer.status_code == 503 and answer.text.startswith("{")):
        return dict(answer.json())
    if answer.status_code in (404, 503):  # Serve's proxy, until it knows the application
        return {"status": "loading", "stage": "starting the application"}
    return {"status": "failed", "stage": f"{base}/health answered {answer.status_code}: {answer.text[:500]}"}
