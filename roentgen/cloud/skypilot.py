"""Runs SkyPilot's `sky` command, which launches and manages clusters in clouds.

SkyPilot and the server need different versions of click and cannot share an environment, so `sky` runs as a program: the one
that $ROENTGEN_SKY names, the one installed by `make cloud-env`, or the one on the PATH. Only SkyPilot records which clusters
exist.
"""

import json
import os
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roentgen.serving.local_server import LaunchError

ROOT = Path(__file__).parents[2]
SKY_QUERIES = Path(__file__).parent / "sky_queries.py"
GONE_TIMEOUT_S = 300.0

JOB_FAILED = 100
"""SkyPilot's exit code for a job that ran and failed; other codes mean that it did not run."""


@dataclass(frozen=True)
class Cluster:
    """A cluster in SkyPilot's records."""

    name: str
    """The cluster's name."""
    status: str
    """UP, INIT or STOPPED."""
    nodes: int
    """Number of nodes."""
    resources: str
    """Its machines, in SkyPilot's notation."""
    autostop: int
    """Idle minutes after which it terminates itself; -1 for never."""


class SkyPilot:
    """The `sky` command."""

    def __init__(self, command: str | None = None) -> None:
        """Find the command.

        Args:
            command: its path; None searches for it.

        Raises:
            LaunchError: if SkyPilot is not installed.
        """
        own = ROOT / ".venv-cloud" / "bin" / "sky"
        found = command or os.environ.get("ROENTGEN_SKY") or (str(own) if own.exists() else shutil.which("sky"))
        if found is None:
            raise LaunchError(
                "SkyPilot is not installed: run `make cloud-env`, which installs it into .venv-cloud (it cannot share an "
                "environment "
                "with the server's packages), or put `sky` on the PATH"
            )
        self.command = found

    def clusters(self, *, refresh: bool = False) -> list[Cluster]:
        """List the clusters.

        Args:
            refresh: also query the clouds, instead of only SkyPilot's records.

        Raises:
            LaunchError: if SkyPilot fails.
        """
        listed = self._json(["status", *(["--refresh"] if refresh else []), "-o", "json"])
        return [_cluster(entry) for entry in listed]

    def find(self, name: str, *, refresh: bool = False) -> Cluster | None:
        """Return a cluster by name; None if it does not exist."""
        return next((cluster for cluster in self.clusters(refresh=refresh) if cluster.name == name), None)

    def cost(self, name: str) -> list[dict[str, Any]]:
        """Return SkyPilot's estimates of the cost of clusters with a name, newest first."""
        listed = self._json(["cost-report", "--all", "-o", "json"])
        return [entry for entry in listed if entry.get("name") == name]

    def stream(
        self, arguments: Sequence[str], say: Callable[[str], None], environment: Mapping[str, str] | None = None
    ) -> tuple[int, list[str]]:
        """Run a command and pass on every line it prints; return its exit code and its last lines.

        On Ctrl-C the command gets the same signal, because it shares the terminal; wait for it to exit.
        """
        last: deque[str] = deque(maxlen=40)
        with subprocess.Popen(
            [self.command, *arguments],
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if text := line.rstrip():
                    last.append(text)
                    say(text)
        return process.returncode, list(last)

    def down(self, name: str, say: Callable[[str], None], timeout_s: float = GONE_TIMEOUT_S) -> list[str]:
        """Terminate a cluster and wait until its provider confirms that the instances are terminated.

        Args:
            name: name of the cluster.
            say: called with each line of progress.
            timeout_s: time limit for the provider after `sky down` has ended.

        Returns:
            The ids of the terminated instances.

        Raises:
            LaunchError: if the cluster does not exist, `sky down` fails, or instances still run.
        """
        if self.find(name) is None:
            raise LaunchError(f"there is no cluster {name!r}; `sky status --refresh` lists the clusters")
        # SkyPilot forgets where the instances are once it has terminated them, so query this first.
        where = self._in_sky("where", name)
        had = self._in_sky("instances", json.dumps(where))
        # `--graceful` waits for pending uploads of mounted buckets.
        code, last = self.stream(["down", "--yes", "--graceful", name], say)
        if code:
            raise LaunchError(
                f"`sky down {name}` failed: INSTANCES MAY STILL RUN AND COST MONEY; see `sky status --refresh` and the "
                "provider's console. Its output:\n" + "\n".join(last)
            )
        deadline = time.monotonic() + timeout_s
        while left := self._in_sky("instances", json.dumps(where)):
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"{where['provider']} still has instances of {name} after {timeout_s:.0f} s: {', '.join(left)}. THEY COST "
                    "MONEY; terminate them in the provider's console"
                )
            say(f"waiting for {where['provider']} to terminate {', '.join(left)}")
            time.sleep(3)
        return list(had)

    def _in_sky(self, *arguments: str) -> Any:
        """Query SkyPilot's Python API in its environment, for what its command line does not report."""
        python = Path(self.command).parent / "python"
        command = [str(python) if python.exists() else "python3", str(SKY_QUERIES), *arguments]
        return _read(subprocess.run(command, capture_output=True, text=True, check=False), "SkyPilot's state")

    def _json(self, arguments: Sequence[str]) -> Any:
        done = subprocess.run([self.command, *arguments], capture_output=True, text=True, check=False)
        return _read(done, f"`sky {' '.join(arguments)}`")


def _read(done: subprocess.CompletedProcess[str], what: str) -> Any:
    """Parse the JSON at the end of a command's output; SkyPilot prints hints before it."""
    if done.returncode == 0:
        lines = done.stdout.splitlines()
        for number, line in enumerate(lines):
            if line[:1] in "[{":
                try:
                    return json.loads("\n".join(lines[number:]))
                except ValueError:
                    continue
    raise LaunchError(f"{what} cannot be read: {(done.stdout + done.stderr).strip()[-2000:]}")


def _cluster(entry: Mapping[str, Any]) -> Cluster:
    return Cluster(
        name=entry["name"],
        status=str(entry["status"]).rpartition(".")[2],
        nodes=int(entry.get("nodes") or 1),
        resources=str(entry.get("resources_str") or ""),
        autostop=-1 if entry.get("autostop") is None else int(entry["autostop"]),
    )
