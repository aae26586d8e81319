"""Deploys serve.yaml on a cluster; cluster/start.sh runs it last, on the head. A second run applies only changes.

serve.yaml contains what all launches share. The launch's own settings (model, store, port, replicas) come from cluster.yaml's
variables. Both are merged into one declarative configuration of Ray Serve, which keeps running what has not changed. The
configuration contains a hash of the code and of the bucket's keys, so that only a launch with edited code or other keys
restarts the replicas. The port cannot change while Serve runs, so Serve is shut down for that.

    python -m roentgen.cloud.deploy --address HEAD:6379 --nodes 2 --gpus-per-node 1
"""

import hashlib
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from httpx2 import Client, HTTPError, Response

from roentgen.api_keys import VARIABLE, api_keys
from roentgen.contract import DEFAULT_TAPS_NAME
from roentgen.defaults import DASHBOARD_PORT, HOST, PORT
from roentgen.http_client import connect, explain
from roentgen.ray_connection import ClusterError, connected
from roentgen.serving.local_server import APP_NAME, LaunchError, wait_until_ready

ROOT = Path(__file__).parents[2]
SERVE = f"http://{HOST}:{DASHBOARD_PORT}/api/serve/applications/"
NODES_TIMEOUT_S = 900.0
DEPLOY_TIMEOUT_S = 900.0
START_TIMEOUT_S = 180.0
RETRY_S = 5.0
BUCKET = ("AWS_ENDPOINT_URL", "AWS_REGION")
CODE = ("serve_app/**/*.py", "roentgen/*.py", "roentgen/store/**/*.py", "constraints*.txt")


def render(
    config: Mapping[str, Any], environment: Mapping[str, str], nodes: int, gpus_per_node: int, version: str
) -> dict[str, Any]:
    """Merge a launch's settings into the content of serve.yaml.

    Args:
        config: serve.yaml's content.
        environment: MODEL, REVISION, DTYPE, ENGINE, TAPS, STORE, PORT, REPLICAS, MAX_REPLICAS,
            ROENTGEN_API_KEY, AWS_ENDPOINT_URL, AWS_REGION; absent and empty ones have defaults.
        nodes: number of nodes.
        gpus_per_node: number of GPUs per node.
        version: hash of what replicas read when they start; they are restarted when it changes.

    Raises:
        LaunchError: if a variable is not a number, or there are too many replicas for the cluster.
    """
    per_node = max(1, gpus_per_node)
    places = nodes * per_node
    (application,) = config["applications"]
    # serve.yaml sets the number of GPUs of a model that needs several.
    given = application["args"]
    gpus = float(given.get("num_gpus", given.get("tensor_parallel_size", 1))) or 1
    if gpus_per_node and gpus > 1:
        per_node = int(gpus_per_node // gpus)
        places = nodes * per_node
    replicas = _number(environment, "REPLICAS", places)
    most = _number(environment, "MAX_REPLICAS", replicas)
    if not 1 <= replicas <= most <= places:
        raise LaunchError(
            f"REPLICAS={replicas} and MAX_REPLICAS={most}: REPLICAS may not exceed MAX_REPLICAS, and {nodes} nodes with "
            f"{gpus_per_node} GPUs have room for 1 to {places} replicas"
        )
    args = {
        **application["args"],
        "model": environment["MODEL"],
        "revision": environment.get("REVISION") or None,
        "dtype": environment.get("DTYPE") or "auto",
        "engine": environment.get("ENGINE") or given.get("engine", "auto"),
        "taps": environment.get("TAPS") or given.get("taps", DEFAULT_TAPS_NAME),
        "store": environment["STORE"],
        "num_replicas": replicas,
        "max_replicas": most,
        "max_replicas_per_node": per_node,
        "num_ingresses": nodes,
    }
    http = {**config["http_options"], "port": _number(environment, "PORT", PORT)}
    if api_keys(environment.get(VARIABLE, "")):
        http["host"] = "0.0.0.0"
    variables = {name: environment[name] for name in BUCKET if environment.get(name)}
    runtime_env = {"env_vars": {"ROENTGEN_VERSION": version, **variables}}
    return {
        **config,
        "http_options": http,
        "applications": [{**application, "args": args, "runtime_env": runtime_env}],
    }


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdigit()):
        raise LaunchError(f"{name}={text}: not an integer")
    return int(text)


def version_hash(keys: Path, root: Path = ROOT) -> str:
    """Return a hash of what replicas read when they start: the code and the bucket's keys.

    Args:
        keys: AWS's credentials file; it need not exist.
        root: root folder of the code.
    """
    digest = hashlib.sha256(keys.read_bytes() if keys.exists() else b"")
    for pattern in CODE:
        for file in sorted(root.glob(pattern)):
            digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def wait_for_nodes(wanted: int, timeout_s: float = NODES_TIMEOUT_S) -> None:
    """Wait until a number of nodes are alive in the connected Ray cluster.

    Raises:
        LaunchError: if they are not alive in time.
    """
    import ray

    deadline = time.monotonic() + timeout_s
    # Ray also lists dead nodes, and a node that rejoins counts as a new one.
    while (alive := sum(node["Alive"] for node in ray.nodes())) < wanted:
        if time.monotonic() > deadline:
            raise LaunchError(f"only {alive} of {wanted} nodes joined within {timeout_s:.0f} s")
        _log(f"{alive} of {wanted} nodes have joined")
        time.sleep(3)


def wait_until_deployed(timeout_s: float = DEPLOY_TIMEOUT_S) -> None:
    """Wait until every replica has the newest configuration; until then an older replica may still answer.

    Raises:
        LaunchError: if the application cannot be deployed, or not in time.
    """
    from ray import serve

    deadline = time.monotonic() + timeout_s
    last = ""
    while (found := serve.status().applications.get(APP_NAME)) is None or found.status != "RUNNING":
        if found is not None and found.status == "DEPLOY_FAILED":
            raise LaunchError(f"Serve cannot deploy: {found.message}")
        if time.monotonic() > deadline:
            raise LaunchError(f"not deployed after {timeout_s:.0f} s: {found.message if found else 'not started'}")
        waiting_for = [name for name, one in found.deployments.items() if one.status != "HEALTHY"] if found else []
        if waiting_for and last != (last := f"starting replicas: {', '.join(waiting_for)}"):
            _log(last)
        time.sleep(1)


def main(
    address: Annotated[str, typer.Option(help="Address of the Ray cluster, HOST:PORT.")],
    nodes: Annotated[int, typer.Option(help="Number of nodes.")],
    gpus_per_node: Annotated[int, typer.Option(help="Number of GPUs per node.")] = 0,
) -> None:
    """Deploy serve.yaml and wait until the model is ready at every address. The exit code is 2 on failure."""
    try:
        version = version_hash(Path(os.environ["AWS_SHARED_CREDENTIALS_FILE"]))
        config = render(yaml.safe_load((ROOT / "serve.yaml").read_text()), os.environ, nodes, gpus_per_node, version)
        with connected(address):
            wait_for_nodes(nodes)
            deploy(config)
            wait_until_deployed()
        # A node's proxy starts after its replica.
        for url in os.environ["ROENTGEN_BASE_URL"].split(","):
            wait_until_ready(url.removesuffix("/v1"), _log)
    except (ClusterError, LaunchError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    _log(f"serving {os.environ['MODEL']} at {os.environ['ROENTGEN_BASE_URL']}, activations in {os.environ['STORE']}")


def deploy(config: dict[str, Any]) -> None:
    """Apply a configuration to Serve on the connected Ray cluster.

    Raises:
        LaunchError: if Serve refuses it.
    """
    from ray import serve

    with connect(SERVE, os.environ["RAY_AUTH_TOKEN"], 120) as client:
        listens = _request(client, "GET").json().get("http_options") or {}
        if any(listens.get(name, wanted) != wanted for name, wanted in config["http_options"].items()):
            _log(f"Serve listens on {listens['host']}:{listens['port']}; restarting it")
            serve.shutdown()
        put(client, config)


def put(client: Client, config: dict[str, Any], timeout_s: float = START_TIMEOUT_S) -> None:
    """Send a configuration to Serve, which starts if it does not run; retry after a 5xx.

    On a slow machine a proxy may not be ready in time. Serve then stops it, answers 500 and starts another, so a retry
    succeeds. Errors in the configuration itself are 4xx.

    Raises:
        LaunchError: if Serve refuses it, or still fails after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            _request(client, "PUT", config)
        except _ServeFailedError:
            if time.monotonic() > deadline:
                raise
            _log("Serve is not ready yet; retrying")
            time.sleep(RETRY_S)
        else:
            return


class _ServeFailedError(LaunchError):
    """Serve answered 5xx; a retry may succeed."""


def _request(client: Client, method: str, body: dict[str, Any] | None = None) -> Response:
    try:
        answer = client.request(method, SERVE, json=body)
    except HTTPError as error:
        raise LaunchError(f"Ray's dashboard {explain(error)}") from error
    if answer.is_server_error:
        raise _ServeFailedError(f"Serve failed to accept the application {APP_NAME}: {answer.text[-2000:]}")
    if answer.is_error:
        raise LaunchError(f"Serve refused the application {APP_NAME}: {answer.status_code}: {answer.text[-2000:]}")
    return answer


def _log(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    typer.run(main)
