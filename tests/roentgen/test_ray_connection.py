"""Connecting to Ray: named addresses only, and a Ray started here is locked to strangers."""

import subprocess
import sys

import pytest

from roentgen.ray_connection import ClusterError, check_address, connected
from tests.conftest import RayHome

STARTED_HERE = """
import os, subprocess, sys, threading, ray
from concurrent.futures import ThreadPoolExecutor
from roentgen.ray_connection import connected
with connected("local"):
    assert ray.get(ray.remote(lambda: 1).remote()) == 1
    with connected("127.0.0.1:1"):  # a connection that exists is used, and left
        pass
    assert ray.is_initialized()
    knock = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", ray.get_runtime_context().gcs_address]
    assert subprocess.run(knock).returncode == 0, "the token is known here"
    stranger = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    assert subprocess.run(knock, env=stranger, capture_output=True).returncode != 0, "a stranger got in"
assert not ray.is_initialized()

first, second = threading.Barrier(2), threading.Event()
def short():
    with connected("local"):
        first.wait()
    second.set()
with ThreadPoolExecutor(1) as pool:
    gone = pool.submit(short)
    with connected("local"):
        first.wait()
        second.wait()
        assert ray.get(ray.remote(lambda: 2).remote()) == 2, "who leaves first takes it from no other"
    gone.result()
assert not ray.is_initialized()
"""


@pytest.mark.parametrize("address", ["local", "10.0.0.1:6379", "head:6379"])
def test_addresses_that_are_named(address: str) -> None:
    assert check_address(address) == address


@pytest.mark.parametrize("address", ["auto", "", "head", "head:", ":6379", "head:port", "ray://head"])
def test_addresses_that_are_refused(address: str) -> None:
    with pytest.raises(ValueError, match="allowed are local and HOST:PORT"):
        check_address(address)


@pytest.mark.integration
def test_a_ray_started_here_is_locked_shared_and_ends(ray_home: RayHome) -> None:
    command = [sys.executable, "-c", STARTED_HERE]
    done = subprocess.run(command, env=ray_home.environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert ray_home.wait_until_gone() == []


def test_a_cluster_that_is_not_there_is_said_to_be_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(ClusterError, match=r"no Ray cluster answers at 127\.0\.0\.1:9"), connected("127.0.0.1:9"):
        pass


def test_a_ray_that_does_not_start_in_time_is_said_to_be_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own error is a bare `Exception`, which no command expects."""
    import ray

    def times_out(**options: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", times_out)
    with pytest.raises(ClusterError, match=r"Ray did not start on this machine .*timed out"), connected("local"):
        pass
