"""Finds and stops the process that listens on a port of this machine.

A forgotten server on a port answers `/health` and hides the new one.
"""

import re
import socket
from dataclasses import dataclass

import psutil

from roentgen.defaults import HOST

OURS = re.compile(r"(^|/)ssh .*-L ?\d+:localhost:\d+|\broentgen(\.cloud\.deploy)? |\bserve_app\b|^ray::")
STOP_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Listener:
    """A process that listens on a port."""

    port: int
    """The port."""
    pid: int | None
    """The process id; None if the process belongs to another user."""
    command: str
    """The command line."""

    @property
    def is_ours(self) -> bool:
        """Whether it is a Roentgen server or tunnel."""
        return OURS.search(self.command) is not None

    def __str__(self) -> str:
        who = f"process {self.pid} ({self.command[:120]})" if self.pid else "a process of another user"
        return f"port {self.port} is used by {who}"


def find_listener(port: int) -> Listener | None:
    """Return the listener on a TCP port of this machine, on any address."""
    found = _listed(port)
    if found is None and not _answers(port):
        return None
    # psutil lists processes before sockets, so a second look finds the process of a listener that has just started.
    if found is None or found.pid is None:
        found = _listed(port)
    return found or Listener(port, None, "")  # sockets of other users may not be listed


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def _listed(port: int) -> Listener | None:
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr[1:2] == (port,):
            return Listener(port, connection.pid, _command(connection.pid))
    return None


def stop(listener: Listener) -> None:
    """Terminate a process; kill it if it does not exit."""
    if listener.pid is None:
        return
    try:
        process = psutil.Process(listener.pid)
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except psutil.TimeoutExpired:
            process.kill()
            process.wait(STOP_TIMEOUT_S)
    except psutil.NoSuchProcess:
        return


def _command(pid: int | None) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline()) if pid else ""
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""
