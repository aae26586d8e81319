"""A real SkyPilot from `roentgen up` to `roentgen cluster down`, against an EC2 made of namespaces on this machine.

Not covered: CUDA, buckets mounted with FUSE, autostop.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from roentgen.launch.local import free_port
from roentgen.launch.ports import find_listener
from roentgen.runs import Run
from roentgen.store import Session, verify
from tests.cloud.conftest import make_home
from tests.cloud.fake_ec2 import BRIDGE, why_not
from tests.conftest import ROENTGEN

NAME = "rtg-test"


@dataclass(frozen=True)
class Cloud:
    """A cloud with nothing in it yet, and what it takes to use it."""

    environment: dict[str, str]
    port: int

    def roentgen(self, *arguments: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [ROENTGEN, *arguments], env=self.environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    @property
    def hosts(self) -> int:
        """How many hosts are up: each has a link on the bridge."""
        return len(list(Path(f"/sys/class/net/{BRIDGE}/brif").iterdir()))


@pytest.fixture(scope="module")
def cloud(sky_python: Path) -> Iterator[Cloud]:
    if reason := why_not():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="rt-cloud-", dir="/tmp"))  # not on a file system that refuses overlays
    home = folder / "home"
    port = free_port("127.0.0.1")
    endpoint = f"http://127.0.0.1:{port}"
    environment = make_home(home) | {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
        "ROENTGEN_SKY": str(sky_python.parent / "sky"),
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
    }
    (home / ".aws").mkdir()
    (home / ".aws" / "credentials").write_text(
        "[default]\naws_access_key_id = testing\naws_secret_access_key = testing\n"
    )
    # ssh looks for its configuration where the password file says, not in $HOME; SkyPilot writes to the latter.
    (home / ".ssh").mkdir(mode=0o700)
    (home / ".ssh" / "config").touch()
    (folder / "bin").mkdir()
    (folder / "bin" / "ssh").write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {home}/.ssh/config "$@"\n')
    (folder / "bin" / "ssh").chmod(0o755)
    log = (folder / "moto.log").open("w")
    moto = subprocess.Popen(
        [str(sky_python.parent / "moto_server"), "-p", str(port)],
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    ec2 = None
    try:
        deadline = time.monotonic() + 60
        while find_listener(port) is None:
            assert time.monotonic() < deadline, "moto did not start"
            time.sleep(0.2)
        command = [str(sky_python), str(Path(__file__).parent / "fake_ec2.py"), endpoint, str(folder / "hosts")]
        ec2 = subprocess.Popen([*command, sys.prefix, sys.base_prefix], stdout=subprocess.PIPE, text=True)
        assert ec2.stdout is not None
        assert ec2.stdout.readline() == "ready\n"
        yield Cloud(environment, free_port("127.0.0.1"))
    finally:
        sky = [environment["ROENTGEN_SKY"], "api", "stop"]
        subprocess.run(sky, env=environment, capture_output=True, check=False, timeout=120)
        if ec2 is not None:
            ec2.terminate()
            ec2.wait(60)
        moto.kill()
        moto.wait()


def test_up_evaluate_reuse_and_down(cloud: Cloud, tmp_path: Path) -> None:
    """The whole life of a cluster; one test, because each step needs the one before."""
    options = ("--model", "smollm2-135m", "--min-vram", "0", "--port", str(cloud.port), "--name", NAME)
    up = cloud.roentgen("up", *options, "--infra", "aws")
    assert up.returncode == 0, up.stderr[-6000:]
    assert "reached through a tunnel too" in up.stderr
    assert f"roentgen cluster down {NAME}" in up.stdout
    assert cloud.hosts == 1

    again = cloud.roentgen("up", *options)
    assert again.returncode == 2
    assert "exists (UP): use it with --reuse" in again.stderr
    reused = cloud.roentgen("up", *options, "--reuse", "--skip-sync")
    assert reused.returncode == 0, reused.stderr[-6000:]
    assert cloud.hosts == 1

    output = tmp_path / "run"
    evaluation = ("--problems", "arithmetic", "--samples", "4", "--max-tokens", "8", "--collect-activations")
    on = ("--launch", "--cluster", NAME, "--model", "smollm2-135m", "--port", str(cloud.port), "--skip-sync")
    done = cloud.roentgen("eval", *evaluation, *on, "--transfer-activations", "--output", str(output))
    assert done.returncode == 0, done.stderr[-6000:]
    assert f"{NAME} was there before and is left running" in done.stderr
    samples = Run.open(output).samples()
    assert [sample.error for sample in samples] == [None] * 4
    session = Session.open(str(output / "activations" / samples[0].rollouts[0].session_id))
    assert verify(session).rollouts == 4

    doctor = cloud.roentgen("doctor", NAME, "--port", str(cloud.port))
    assert "RUNNING" in doctor.stdout, doctor.stdout + doctor.stderr
    assert NAME in cloud.roentgen("cluster", "status").stdout

    down = cloud.roentgen("cluster", "down", NAME)
    assert down.returncode == 0, down.stderr[-6000:]
    assert "its provider says that i-" in down.stdout
    deadline = time.monotonic() + 10
    while cloud.hosts and time.monotonic() < deadline:
        time.sleep(0.2)
    assert cloud.hosts == 0
    assert NAME not in cloud.roentgen("cluster", "status").stdout
