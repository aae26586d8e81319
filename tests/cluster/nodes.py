"""Several hosts on one machine: each node has network, mount, process, host-name and IPC namespaces of its own, on a bridge.

A node runs what a cloud's machine would run: cluster/start.sh under the variables that SkyPilot sets. The process namespace is
what makes a loss real: SIGKILL to its init takes every process of the node with it at once, closes no connection (its
network is gone in the same moment), and touches no other node. A host dies with the process that started it, however that
ends. Needs root, iproute2 and util-linux.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
BRIDGE = "br-roentgen"
NETWORK = "10.177.0"
GATEWAY = f"{NETWORK}.1"
"""This machine, as hosts see it."""

NAMESPACES = ("setpriv", "--pdeathsig=KILL", "unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork")

INIT = """
mount --make-rprivate /
mkdir -p /tmp/ray
mount -t tmpfs -o size=2g tmpfs /dev/shm
mount -t tmpfs -o size=2g tmpfs /tmp/ray
hostname node{rank}
exec sleep infinity
"""


def why_not() -> str | None:
    """Say why there can be no nodes here, if so."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [command for command in ("ip", "unshare", "nsenter", "setpriv") if shutil.which(command) is None]
    if missing:
        return f"{', '.join(missing)} missing: apt-get install iproute2 util-linux"
    tried = subprocess.run([*NAMESPACES, "--mount-proc", "true"], capture_output=True, text=True, check=False)
    return f"namespaces cannot be made here: {tried.stderr.strip()}" if tried.returncode else None


class Node:
    """A host of its own on this machine; its processes see this machine's files, but for /tmp/ray and /dev/shm."""

    def __init__(self, cluster: "Nodes", rank: int) -> None:
        self.cluster = cluster
        self.rank = rank
        self.ip = f"{NETWORK}.{10 + rank}"
        self.home = cluster.folder / f"node{rank}"
        self._outside: subprocess.Popen[bytes] | None = None
        self._init = 0

    def start(self) -> None:
        """Bring the host up, with its address on the bridge."""
        self.home.mkdir(exist_ok=True)
        command = [*NAMESPACES, "--kill-child=KILL", "--mount-proc", "bash", "-c", INIT.format(rank=self.rank)]
        self._outside = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        children = Path(f"/proc/{self._outside.pid}/task/{self._outside.pid}/children")
        while not (child := children.read_text().split()):
            time.sleep(0.05)
        self._init = int(child[0])
        while Path(f"/proc/{self._init}/comm").read_text().strip() != "sleep":
            time.sleep(0.05)
        link = f"v-rtg{self.rank}"
        # A host that was lost leaves its end for a moment.
        subprocess.run(["ip", "link", "del", link], check=False, capture_output=True)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(self._init))
        _ip("link", "set", link, "master", BRIDGE, "up")
        inside = ["nsenter", "-t", str(self._init), "-n", "ip"]
        for step in (
            ["addr", "add", f"{self.ip}/24", "dev", "eth0"],
            ["link", "set", "eth0", "up"],
            ["link", "set", "lo", "up"],
            ["route", "add", "default", "via", GATEWAY],
        ):
            subprocess.run([*inside, *step], check=True, capture_output=True)

    def popen(
        self, *command: str, log: Path | None = None, environment: Mapping[str, str] = {}
    ) -> subprocess.Popen[str]:
        """Start a command on the host, with SkyPilot's variables and the cluster's own."""
        output = log.open("w") if log else subprocess.PIPE
        return subprocess.Popen(
            [
                "nsenter",
                "-t",
                str(self._init),
                "-a",
                f"--wd={ROOT}",
                "env",
                "-i",
                *self._environment(environment),
                *command,
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: str, timeout: float = 300, environment: Mapping[str, str] = {}) -> str:
        """Run a command on the host and return what it says.

        Raises:
            AssertionError: if it fails.
        """
        process = self.popen(*command, environment=environment)
        try:
            said, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        assert process.returncode == 0, f"{' '.join(command)} on node {self.rank}: {said}"
        return said

    def kill(self) -> None:
        """Lose the host: its init is killed with SIGKILL, and everything on it with that."""
        os.kill(self._init, signal.SIGKILL)
        assert self._outside is not None
        self._outside.wait(10)

    def stop(self) -> None:
        """Take the host down, if it is up."""
        if self._outside is not None and self._outside.poll() is None:
            self.kill()

    def _environment(self, more: Mapping[str, str]) -> list[str]:
        of_skypilot = {
            "SKYPILOT_NODE_RANK": str(self.rank),
            "SKYPILOT_NODE_IPS": "\n".join(node.ip for node in self.cluster.nodes),
            "SKYPILOT_NUM_NODES": str(len(self.cluster.nodes)),
            "SKYPILOT_NUM_GPUS_PER_NODE": "0",
        }
        basic = {"HOME": str(self.home), "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
        return [
            f"{name}={value}" for name, value in {**basic, **of_skypilot, **self.cluster.environment, **more}.items()
        ]


class Nodes:
    """A cluster of hosts; a context manager that leaves nothing behind."""

    def __init__(self, count: int, folder: Path, environment: Mapping[str, str]) -> None:
        """Describe the cluster.

        Args:
            count: of hosts.
            folder: for their home folders and logs.
            environment: of every command, as cluster.yaml's envs and secrets give it.
        """
        self.folder = folder
        self.environment = dict(environment)
        self.nodes = [Node(self, rank) for rank in range(count)]

    def __enter__(self) -> "Nodes":
        subprocess.run(["ip", "link", "del", BRIDGE], check=False, capture_output=True)
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{GATEWAY}/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        for node in self.nodes:
            node.start()
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            node.stop()
        _ip("link", "del", BRIDGE)

    def launch(self, timeout: float = 600) -> None:
        """Run cluster/start.sh on every host at once, as SkyPilot does, and wait for all."""
        started = {
            node: node.popen("bash", "cluster/start.sh", log=self.folder / f"start-{node.rank}.log")
            for node in self.nodes
        }
        deadline = time.monotonic() + timeout
        try:
            for node, process in started.items():
                code = process.wait(max(1, deadline - time.monotonic()))
                assert code == 0, f"node {node.rank}: {self.log(node)}"
        except subprocess.TimeoutExpired:
            raise AssertionError("\n".join(f"node {node.rank}: {self.log(node)}" for node in started)) from None
        finally:
            for process in started.values():
                process.kill()

    def log(self, node: Node) -> str:
        """Return what a host's start script said last."""
        return (self.folder / f"start-{node.rank}.log").read_text()[-3000:]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
