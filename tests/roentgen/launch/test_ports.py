"""Who has a port: real processes, named and stopped."""

import os
import subprocess
import sys
import time

from roentgen.launch.local import free_port
from roentgen.launch.ports import Listener, find_listener, stop

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
        assert f"port {port} is taken by process {process.pid}" in str(found)
        assert not found.is_ours
        stop(found)
        process.wait(20)
        assert find_listener(port) is None
        stop(found)  # gone already
    finally:
        process.kill()


def test_what_is_ours() -> None:
    def ours(command: str) -> bool:
        return Listener(8000, os.getpid(), command).is_ours

    assert ours("ssh -N -o BatchMode=yes -L 8000:localhost:8000 roentgen")
    assert ours("/home/me/.venv/bin/python /home/me/.venv/bin/roentgen serve --port 8000")
    assert ours("ray::ProxyActor")
    assert not ours("nginx: master process /usr/sbin/nginx")
    assert not ours("ssh me@elsewhere")
    assert not ours("python /home/me/roentgen/notebook.py")
