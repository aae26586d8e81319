"""What the tests ask of a running cluster, each as a person at the head node would: ray, curl, HTTP."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.nodes import Node, Nodes

RAY = str(Path(sys.prefix) / "bin" / "ray")
DASHBOARD = "http://127.0.0.1:8265"
LOCKED = {"RAY_AUTH_MODE": "token"}


@dataclass(frozen=True)
class Answer:
    """What an HTTP request met."""

    status: int
    body: str


class Cluster:
    """A launched cluster of hosts."""

    def __init__(self, nodes: Nodes) -> None:
        self.hosts = nodes
        self.head, *self.workers = nodes.nodes

    @property
    def folder(self) -> Path:
        return self.hosts.folder

    @property
    def key(self) -> str:
        return self.hosts.environment["ROENTGEN_API_KEY"]

    @property
    def port(self) -> str:
        return self.hosts.environment["PORT"]

    def ask(self, node: Node, path: str, body: dict[str, Any] | None = None, key: str | None = None) -> Answer:
        """Send a request from this machine to a node's server; status 0 if nothing answers there."""
        request = urllib.request.Request(
            f"http://{node.ip}:{self.port}{path}",
            json.dumps(body).encode() if body is not None else None,
            {"Content-Type": "application/json", "Authorization": f"Bearer {self.key if key is None else key}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return Answer(response.status, response.read().decode())
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.read().decode())
        except OSError as error:
            return Answer(0, str(error))

    def deployment(self, name: str) -> list[dict[str, Any]]:
        """Return the running replicas of a deployment, as Serve's controller lists them."""
        token = self.hosts.environment["RAY_AUTH_TOKEN"]
        curl = ["curl", "-sf", "-H", f"Authorization: Bearer {token}", f"{DASHBOARD}/api/serve/applications/"]
        found = json.loads(self.head.run(*curl))["applications"]["roentgen"]["deployments"][name]["replicas"]
        return [replica for replica in found if replica["state"] == "RUNNING"]

    def node_of(self, replica: dict[str, Any]) -> Node:
        """Return the host that a replica runs on."""
        return next(node for node in self.hosts.nodes if node.ip == replica["node_ip"])

    def submit(self, *options: str, log: Path) -> subprocess.Popen[str]:
        """`ray job submit` an evaluation at the head, with the cluster's own environment."""
        command = [RAY, "job", "submit", "--address", DASHBOARD, "--", "python", "-m", "eval_jobs", *options]
        return self.head.popen(*command, log=log, environment=LOCKED)


def wait_until(condition: Callable[[], bool], seconds: float, what: Callable[[], str]) -> None:
    """Wait until something holds.

    Raises:
        AssertionError: if it does not in time, saying what was found instead.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.5)
