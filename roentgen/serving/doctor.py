"""`roentgen doctor`: diagnoses a server or a node, and says how to fix what is wrong.

Each check is one small function that returns a `Diagnosis` with a verdict: fine, note or wrong, with a remedy. A check that
fails itself is reported as wrong, and does not stop the others.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from httpx2 import URL, Client, HTTPError

from roentgen.http_client import connect
from roentgen.serving.ports import find_listener

Verdict = Literal["fine", "note", "wrong"]
PINNED = (("nnsight", "0.8"), ("transformers", "5."), ("ray", "2.60"), ("torch", "2.13"))
LOGS = Path("/tmp/ray/session_latest/logs")
TOO_FULL = 0.9


@dataclass(frozen=True)
class Diagnosis:
    """The result of one check."""

    what: str
    """What was checked."""
    verdict: Verdict
    """The verdict."""
    text: str
    """What was found."""
    todo: str = ""
    """How to fix it, if something is wrong."""


def examine_server(base: str, key: str) -> list[Diagnosis]:
    """Check a server over HTTP.

    Args:
        base: http://HOST:PORT.
        key: the server's API key.
    """
    url = URL(base)
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((url.host, port), timeout=5).close()
    except OSError as error:
        todo = "start the server (`roentgen serve`), or open a tunnel: ssh -N -L PORT:localhost:PORT CLUSTER"
        return [Diagnosis("port", "wrong", f"no connection to {url.host}:{port}: {error}", todo)]
    with connect(base, key, 30) as client:
        checks: list[Callable[[Client], Diagnosis]] = [_health, _routes, _model, _sessions]
        answered = Diagnosis("port", "fine", f"{url.host}:{port} accepts connections")
        return [answered, *(_run_check(check, client) for check in checks)]


def examine_here(port: int) -> list[Diagnosis]:
    """Check this machine: the listener on the port, GPUs, disks, packages, Ray's nodes, Serve, and errors in logs."""
    listener = find_listener(port)
    who = Diagnosis(
        "listener", "fine" if listener and listener.is_ours else "wrong" if listener else "note", str(listener)
    )
    if listener is None:
        who = Diagnosis("listener", "note", f"nothing listens on port {port}", "start a server, or give its --port")
    elif not listener.is_ours:
        who = Diagnosis("listener", "wrong", str(listener), "not a Roentgen process: stop it, or choose another --port")
    return [who, _gpu(), *_disk(), *_packages(), *_ray(), *_logs()]


def _run_check(check: Callable[[Client], Diagnosis], client: Client) -> Diagnosis:
    name = check.__name__.lstrip("_")
    try:
        return check(client)
    except (HTTPError, ValueError, KeyError, IndexError) as error:
        return Diagnosis(name, "wrong", f"{type(error).__name__}: {error}", "check that this is a Roentgen server")


def _health(client: Client) -> Diagnosis:
    started = time.monotonic()
    answer = client.get("/health")
    seconds = time.monotonic() - started
    health = answer.json()
    text = f"{health['status']}: {health['stage']} ({1000 * seconds:.0f} ms)"
    if answer.status_code == 200:
        return Diagnosis("health", "fine", text)
    if health["status"] == "loading":
        return Diagnosis("health", "note", text, "wait; the first start may download the model")
    return Diagnosis(
        "health", "wrong", text, "read the replica's log below, or load another model: POST /v1/models/load"
    )


def _routes(client: Client) -> Diagnosis:
    answer = client.get("/openapi.json")
    if answer.status_code == 401:
        return Diagnosis(
            "routes", "wrong", "401: the API key is missing or wrong", "set ROENTGEN_API_KEY to the server's key"
        )
    routes = answer.json()["paths"]
    if "/v1/chat/completions" in routes and "/v1/models/load" in routes:
        return Diagnosis("routes", "fine", f"{len(routes)} routes")
    return Diagnosis(
        "routes", "wrong", f"not a Roentgen server: {', '.join(list(routes)[:5])}", "another server uses this port"
    )


def _model(client: Client) -> Diagnosis:
    answer = client.get("/v1/models")
    if answer.is_error:
        return Diagnosis("model", "wrong", f"{answer.status_code}: {answer.text[:200]}", "see health")
    model = answer.json()["data"][0]
    return Diagnosis("model", "fine", f"{model['id']} ({model.get('dtype')}, {model.get('num_layers')} layers)")


def _sessions(client: Client) -> Diagnosis:
    answer = client.get("/v1/activations/sessions")
    if answer.is_error:
        return Diagnosis(
            "store",
            "wrong",
            f"{answer.status_code}: {answer.text[:200]}",
            "check that the store exists and is writable",
        )
    return Diagnosis("store", "fine", f"{len(answer.json()['data'])} sessions")


def _gpu() -> Diagnosis:
    if shutil.which("nvidia-smi") is None:
        return Diagnosis("GPU", "note", "none (nvidia-smi is not installed); the model runs on the CPU")
    query = "--query-gpu=name,memory.used,memory.total,utilization.gpu"
    done = subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, check=False, timeout=30
    )
    if done.returncode:
        return Diagnosis(
            "GPU", "wrong", (done.stdout + done.stderr).strip()[:300], "the GPU driver does not work; use another node"
        )
    return Diagnosis("GPU", "fine", "; ".join(done.stdout.strip().splitlines()))


def _disk() -> Iterator[Diagnosis]:
    store = os.environ.get("STORE", "")
    folders = [Path.home(), Path("/tmp"), *([Path(store)] if store.startswith("/") else [])]
    for folder in folders:
        if folder.exists():
            usage = shutil.disk_usage(folder)
            full = usage.used / usage.total
            text = f"{folder}: {usage.free / 1e9:.0f} GB free, {full:.0%} used"
            yield Diagnosis(
                "disk", "wrong" if full > TOO_FULL else "fine", text, "free some disk space" if full > TOO_FULL else ""
            )


def _packages() -> Iterator[Diagnosis]:
    for package, wanted in PINNED:
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "not installed"
        good = found.startswith(wanted)
        yield Diagnosis(
            package, "fine" if good else "wrong", found, "" if good else f"requires {wanted}*; run make install"
        )


def _ray() -> Iterator[Diagnosis]:
    """Check the nodes and the Serve applications of the Ray cluster that the start script has set."""
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        yield Diagnosis("Ray", "note", "RAY_ADDRESS is not set; cluster/start.sh has not started a cluster here")
        return
    from roentgen.ray_connection import ClusterError, connected

    try:
        with connected(address):
            import ray
            from ray import serve

            nodes = ray.nodes()
            alive = [node["NodeManagerAddress"] for node in nodes if node["Alive"]]
            lost = {node["NodeManagerAddress"] for node in nodes} - set(alive)
            yield Diagnosis(
                "Ray",
                "wrong" if lost else "fine",
                f"alive: {', '.join(sorted(alive))}" + (f"; lost: {', '.join(sorted(lost))}" if lost else ""),
                "launch cluster.yaml again to replace lost nodes" if lost else "",
            )
            for name, application in serve.status().applications.items():
                states = ", ".join(
                    f"{key} {one.status} {one.replica_states}" for key, one in application.deployments.items()
                )
                good = application.status == "RUNNING"
                yield Diagnosis(
                    "Serve", "fine" if good else "wrong", f"{name} {application.status}: {states}", application.message
                )
    except ClusterError as error:
        yield Diagnosis("Ray", "wrong", str(error), "launch cluster.yaml again")


def _logs() -> Iterator[Diagnosis]:
    """Show the last error of each of Serve's newest logs."""
    newest = sorted((LOGS / "serve").glob("*.log"), key=lambda file: file.stat().st_mtime, reverse=True)[:8]
    for file in newest:
        errors = [line for line in file.read_text(errors="replace").splitlines() if "ERROR" in line or "Error:" in line]
        if errors:
            yield Diagnosis("log", "note", f"{file.name}: {errors[-1][:300]}", f"tail -n 50 {file}")
