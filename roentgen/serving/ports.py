"""Who listens on a port of this machine, and what to do about it.

A stale listener is the seed's classic: a server of last week answers `/health`, and everything after it is a riddle.
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
    """A process that listens on a port.

    Attributes:
        port: it listens on.
        pid: of the process; None if it is another user's.
        command: its command line.
    """

    port: int
    pid: int | None
    command: str

    @property
    def is_ours(self) -> bool:
        """Whether it is a server or a tunnel of Roentgen's."""
        return OURS.search(self.command) is not None

    def __str__(self) -> str:
        who = f"process {self.pid} ({self.command[:120]})" if self.pid else "a process of another user"
        return f"port {self.port} is taken by {who}"


def find_listener(port: int) -> Listener | None:
    """Return who listens on a TCP port of this machine, on any address."""
    found = _listed(port)
    if found is None and not _answers(port):
        return None
    # Whoever began to listen during the first look (psutil lists processes before sockets) is seen whole by a second one.
    if found is None or found.pid is None:
        found = _listed(port)
    return found or Listener(port, None, "")  # where another user's sockets cannot be listed


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def _listed(port: int) -> Listener | None:
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr[1:2] == (port,):
            return Listener(port, connection.pid, _command(connection.pid))
    return None


def stop(listener: Listener) -> None:
    """End a process: ask first, then kill."""
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
