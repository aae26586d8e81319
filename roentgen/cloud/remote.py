"""Access to a launched cluster's head node over ssh; SkyPilot adds the host names to the user's ssh configuration."""

import shlex
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from roentgen.defaults import HOST
from roentgen.serving.local_server import LaunchError
from roentgen.serving.ports import find_listener, stop

WORKDIR = "sky_workdir"
TUNNEL_TIMEOUT_S = 20.0


class Head:
    """The head node of a cluster."""

    def __init__(self, name: str) -> None:
        self.name = name

    def ssh(self, command: str) -> list[str]:
        """Return the ssh command that runs a shell command on the node."""
        return ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", self.name, command]

    def in_project(self, *arguments: str) -> str:
        """Return a shell command that runs a program of the project on the node, in the start script's environment."""
        return f"cd ~/{WORKDIR} && . ~/.roentgen/env && .venv/bin/{shlex.join(arguments)}"

    def run(self, command: str, timeout: float = 120) -> str:
        """Run a shell command on the node and return its output.

        Raises:
            LaunchError: if it fails, or the node does not answer.
        """
        try:
            done = subprocess.run(self.ssh(command), capture_output=True, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired as error:
            raise LaunchError(f"{self.name} did not answer within {timeout:.0f} s") from error
        if done.returncode:
            raise LaunchError(f"on {self.name}: {(done.stdout + done.stderr).strip()[-2000:]}")
        return done.stdout

    def environment(self) -> dict[str, str]:
        """Return the secrets and addresses that the start script stored on the node; empty if it has not run.

        Raises:
            LaunchError: if the node does not answer.
        """
        shown = self.run("cat ~/.roentgen/env 2>/dev/null || true")
        pairs = (shlex.split(line.removeprefix("export "))[0].split("=", 1) for line in shown.splitlines())
        return {name: value for name, value in pairs if value}

    def fetch(self, remote: str, local: Path) -> None:
        """Copy a folder's content from the node, except files that are already here.

        Raises:
            LaunchError: if it cannot be copied.
        """
        local.mkdir(parents=True, exist_ok=True)
        self._copy(f"{self.name}:{remote}/", f"{local}/")

    def push(self, local: Path, remote: str, *, leave_out: str) -> None:
        """Copy a folder's content to the node, except one subfolder; newer files there are kept.

        Raises:
            LaunchError: if it cannot be copied.
        """
        self.run(f"mkdir -p {shlex.quote(remote)}")
        self._copy("--update", f"--exclude=/{leave_out}/", f"{local}/", f"{self.name}:{remote}/")

    def push_file(self, local: Path, folder: str) -> None:
        """Copy a file into a folder on the node.

        Raises:
            LaunchError: if it cannot be copied.
        """
        self.run(f"mkdir -p {shlex.quote(folder)}")
        self._copy(str(local), f"{self.name}:{folder}/")

    def _copy(self, *arguments: str) -> None:
        command = ["rsync", "-a", "--partial", "-e", "ssh -o BatchMode=yes", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            source, target = arguments[-2:]
            raise LaunchError(f"{source} could not be copied to {target}: {done.stderr.strip()[-1000:]}")

    @contextmanager
    def tunnel(self, port: int, *, replace: bool) -> Iterator[str]:
        """Open a tunnel to a port of the node within a context; yields its local address.

        Args:
            port: the port, there and here.
            replace: stop a Roentgen tunnel or server that uses the local port.

        Raises:
            LaunchError: if another process uses the local port, or the tunnel does not open.
        """
        if listener := find_listener(port):
            if not (replace and listener.is_ours):
                raise LaunchError(f"{listener}; stop it, or choose another --port")
            stop(listener)
        options = ["-N", "-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes", "-L", f"{port}:localhost:{port}"]
        process = subprocess.Popen(
            ["ssh", *options, self.name], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        try:
            deadline = time.monotonic() + TUNNEL_TIMEOUT_S
            while find_listener(port) is None:
                if process.poll() is not None or time.monotonic() > deadline:
                    process.kill()
                    output = process.communicate()[1].strip()
                    raise LaunchError(f"no tunnel to {self.name}: {output or 'ssh did not connect'}")
                time.sleep(0.1)
            yield f"http://{HOST}:{port}"
        finally:
            process.terminate()
            process.wait()

    def tail(self, lines: int = 40) -> str:
        """Return the last lines of Serve's newest logs, or why they cannot be read."""
        logs = "/tmp/ray/session_latest/logs/serve"
        shown = f'for f in $(ls -t {logs}/*.log 2>/dev/null | head -3); do echo "== $f"; tail -n {lines} $f; done'
        try:
            return self.run(shown)
        except LaunchError as error:
            return f"(its logs cannot be read: {error})"
