"""Who has a port: real processes, named and stopped."""

import os
import socket
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest

from roentgen.serving.local_server import free_port
from roentgen.serving.ports import Listener, find_listener, stop

LISTEN = "import socket, sys, time; s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); time.sleep(60)"


def wait_for_listener(port: int) -> Listener:
    deadline = time.monotonic() + 20
    while (found := find_listener(port)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_a_listener_is_found_named_and_stopped() -> None:
    port = free_port("127.0.0.1")
    assert find_listener(port) is None
    process = subprocess.Popen([sys.executable, "-c", LISTEN, str(port)])
    try:
        found = wait_for_listener(port)
        assert found.pid == process.pid
        assert f"port {port} is used by process {process.pid}" in str(found)
        assert not found.is_ours
        stop(found)
        process.wait(20)
        assert find_listener(port) is None
        stop(found)  # gone already
    finally:
        process.kill()


@pytest.mark.parametrize("seen", ["not at all", "without its process"])
def test_who_begins_to_listen_while_it_looks_is_named(seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port("127.0.0.1")
    look = psutil.net_connections
    with socket.socket() as listener:

        def first_look(kind: str) -> list[Any]:
            monkeypatch.setattr(psutil, "net_connections", look)
            before = look(kind)
            listener.bind(("127.0.0.1", port))
            listener.listen()
            if seen == "not at all":
                return before
            return [found._replace(pid=None) for found in look(kind)]

        monkeypatch.setattr(psutil, "net_connections", first_look)
        assert find_listener(port) == Listener(port, os.getpid(), " ".join(psutil.Process().cmdline()))


def test_what_is_ours() -> None:
    def ours(command: str) -> bool:
        return Listener(8000, os.getpid(), command).is_ours

    assert ours("ssh -N -o BatchMode=yes -L 8000:localhost:8000 roentgen")
    assert ours("/home/me/.venv/bin/python /home/me/.venv/bin/roentgen serve --port 8000")
    assert ours("python -m roentgen.cloud.deploy --address 10.0.0.1:6379")
    assert ours("ray::ProxyActor")
    assert not ours("nginx: master process /usr/sbin/nginx")
    assert not ours("ssh me@elsewhere")
    assert not ours("python /home/me/roentgen/notebook.py")
