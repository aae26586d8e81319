"""Runs a server, in this process or on Ray Serve, and stops everything it started.

`serving(config, …)` is a context manager that yields the base URL once the model is ready. When the context ends, also after
an error or Ctrl-C, it stops the server, the Serve application that it deployed, and the Ray cluster that it started.

One replica on a CPU needs no Ray: this process serves it, which starts in half the time. Several replicas, GPUs and vLLM use
Ray Serve, on a Ray cluster that is started here or given.
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
"""Time limit of a start; a first start may download the model."""
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
    """Serve a model within a context; yields the base URL, such as `http://127.0.0.1:8000/v1`.

    Args:
        config: the server's configuration.
        host: address to listen on; any other than loopback requires an API key in the environment.
        port: the port; 0 chooses a free one.
        ray_address: "local" starts Ray here; HOST:PORT joins a cluster; None starts Ray only if it is needed.
        stage: called with each stage of the start.
        verbose: show the logs of Ray and the replicas.
        capture: what requests will capture, if known; vLLM taps these hook points, unless the configuration sets `taps`.

    Raises:
        LaunchError: if the port is in use, the address requires an API key, or the model cannot be loaded.
        ClusterError: if no Ray cluster answers at the address.
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
    """Return whether one process without Ray can serve a configuration: one replica on a CPU."""
    copies = max(config.num_replicas, config.max_replicas, config.num_ingresses)
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    return copies == 1 and on_cpu and config.engine != "vllm"


@contextmanager
def _in_this_process(config: ServerConfig, host: str, port: int, verbose: bool) -> Iterator[None]:
    """Serve from this process within a context."""
    from serve_app.in_process import serving_replica

    if verbose:
        write_json_logs()
    with serving_replica(config, host=host, port=port):
        yield


def taps_for(capture: Capture) -> tuple[str, ...]:
    """Return the taps that vLLM needs for a capture: keys of single layers, or hook points for "all" and negative layers."""
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
    """Deploy the Serve application on the connected Ray cluster, and delete it when the context ends."""
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
        if not found_serve:  # on an existing cluster, stop only what was started here
            # Even if Ray stops next: otherwise Serve would look for this controller when it is started again.
            _end_controller()
            serve.shutdown()


def _found_serve(port: int) -> bool:
    """Return whether Serve already runs on this Ray cluster.

    Raises:
        LaunchError: if it already runs a Roentgen server, or listens on another port.
    """
    from ray import serve
    from ray.serve.context import _get_global_client

    running = serve.status()
    if APP_NAME in running.applications:
        raise LaunchError(
            "this Ray cluster already runs a Roentgen server, and can run only one: use that server, stop it, or start this "
            "one "
            "without --ray-address, or from another process with --ray-address local"
        )
    if running.proxies and (client := _get_global_client()) is not None and client.http_config.port != port:
        taken = client.http_config.port
        raise LaunchError(
            f"--port {port}: Ray Serve of this cluster already listens on port {taken}; use --port {taken}"
        )
    return bool(running.proxies)


def _end_controller() -> None:
    """Shut down Serve's controller and its actors, without a retry of the call after the controller has exited.

    `serve.shutdown` alone retries the call forever and prints a failed task to the terminal.
    """
    import ray
    from ray.exceptions import RayActorError

    try:
        controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        ray.get(controller.graceful_shutdown.options(max_task_retries=0).remote(), timeout=STOP_TIMEOUT_S)
    except (
        ValueError,
        TimeoutError,
        RayActorError,
    ):  # there is no controller, it is slow, or it has exited as it should
        return


@contextmanager
def _startable() -> Iterator[None]:
    """Report in one line that Serve did not start, such as on a busy machine."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        yield
    except (RayError, RayServeException, TimeoutError) as error:
        raise LaunchError(f"Ray Serve could not be started: {error}") from error


def check_host(host: str) -> None:
    """Refuse an address that other machines can reach, unless an API key is set.

    Raises:
        LaunchError: if the address is refused.
    """
    loopback = host == "localhost" or _is_loopback(host)
    if not loopback and not api_keys():
        raise LaunchError(
            f"--host {host}: other machines can reach this address, but no API key is set; set ROENTGEN_API_KEY, or use {HOST}"
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
    """Check that a port is valid and free; 0 means any free port.

    Raises:
        LaunchError: if it is not.
    """
    if not 0 <= port <= LAST_PORT:
        raise LaunchError(f"--port {port}: not a valid port; allowed are 1 to {LAST_PORT}, or 0 for any free port")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise LaunchError(
                f"--port {port}: {error.strerror or error}; choose another port, or 0 for any free port"
            ) from error


def wait_until_ready(base: str, stage: Callable[[str], None], timeout_s: float = START_TIMEOUT_S) -> None:
    """Wait until `/health` reports that the model is ready; pass its stages on.

    Raises:
        LaunchError: if the model cannot be loaded, or is not ready in time.
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
    raise LaunchError(f"the server at {base} was not ready after {timeout_s:.0f} s; its last stage was: {last}")


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
