"""A real SkyPilot from `roentgen up` to `roentgen cluster down`, against an EC2 made of namespaces on this machine.

Not covered: CUDA, buckets mounted with FUSE, autostop.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from roentgen.runs import Run
from roentgen.serving.local_server import free_port
from roentgen.serving.ports import find_listener
from roentgen.store import Session, verify
from tests.cloud.conftest import make_home
from tests.cloud.fake_ec2 import BRIDGE, GATEWAY, why_not
from tests.conftest import ROENTGEN
from tests.s3 import BUCKET, lock, s3_endpoint

NAME = "rtg-test"
SKY_API_PORT = 46580


@dataclass(frozen=True)
class Cloud:
    """A cloud with nothing in it yet, and what it takes to use it."""

    folder: Path
    environment: dict[str, str]

    def roentgen(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [ROENTGEN, *arguments], env=self.environment | environment, capture_output=True, text=True, timeout=900,
            check=False,
        )  # fmt: skip

    @property
    def hosts(self) -> int:
        """How many hosts are up: each has a link on the bridge."""
        return len(list(Path(f"/sys/class/net/{BRIDGE}/brif").iterdir()))


@pytest.fixture(scope="module")
def cloud(sky_python: Path) -> Iterator[Cloud]:
    if reason := why_not():
        pytest.skip(reason)
    if listener := find_listener(SKY_API_PORT):
        pytest.skip(f"a SkyPilot server with other credentials runs already: {listener}; `sky api stop` ends it")
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
    # ssh looks for configuration and keys where the password file says, not in $HOME; SkyPilot writes to the latter.
    (home / ".ssh").mkdir(mode=0o700)
    (home / ".ssh" / "config").touch()
    (folder / "bin").mkdir()
    (folder / "bin" / "ssh").write_text(
        f'#!/bin/sh\nexec /usr/bin/ssh -F {home}/.ssh/config -i {home}/.sky/generated/ssh-keys/{NAME}.key "$@"\n'
    )
    (folder / "bin" / "ssh").chmod(0o755)
    log = (folder / "moto.log").open("w")
    # What is started here dies with this process, however that ends; the hosts with what starts them.
    moto = subprocess.Popen(
        ["setpriv", "--pdeathsig=KILL", str(sky_python.parent / "moto_server"), "-p", str(port)],
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    ec2 = None
    try:
        deadline = time.monotonic() + 60
        while find_listener(port) is None:
            assert time.monotonic() < deadline, "moto did not start"
            time.sleep(0.2)
        command = ["setpriv", "--pdeathsig=TERM", str(sky_python), str(Path(__file__).parent / "fake_ec2.py")]
        command += [endpoint, str(folder / "hosts"), sys.prefix, sys.base_prefix]
        ec2 = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert ec2.stdout is not None
        assert ec2.stdout.readline() == "ready\n"
        yield Cloud(folder, environment)
    finally:
        sky = [environment["ROENTGEN_SKY"], "api", "stop"]
        subprocess.run(sky, env=environment, capture_output=True, check=False, timeout=120)
        if ec2 is not None:
            ec2.terminate()
            ec2.wait(60)
        moto.kill()
        moto.wait()
        shutil.rmtree(folder)


def test_up_evaluate_reuse_and_down(cloud: Cloud, tmp_path: Path, gsm8k_test: Path) -> None:
    """The whole life of a cluster; one test, because each step needs the one before."""
    options = ("--model", "smollm2-135m", "--min-vram", "0", "--name", NAME)
    port = str(free_port("127.0.0.1"))
    up = cloud.roentgen("up", *options, "--port", port, "--infra", "aws")
    assert up.returncode == 0, up.stderr[-6000:]
    assert "also reached through a tunnel" in up.stderr
    assert f"roentgen cluster down {NAME}" in up.stdout
    assert cloud.hosts == 1

    again = cloud.roentgen("up", *options)
    assert again.returncode == 2
    assert "exists (UP): use it with --reuse" in again.stderr

    output = tmp_path / "run"
    # A file of this machine: it goes to the cluster with the evaluation.
    evaluation = ("--problems", str(gsm8k_test), "--samples", "4", "--max-tokens", "8", "--collect-activations")
    on = ("--launch", "--cluster", NAME, "--model", "smollm2-135m", "--port", port, "--skip-sync")
    done = cloud.roentgen("eval", *evaluation, *on, "--transfer-activations", "--output", str(output))
    assert done.returncode == 0, done.stderr[-6000:]
    assert f"{NAME} existed before and keeps running" in done.stderr
    samples = Run(output).read_samples()
    assert [sample.error for sample in samples] == [None] * 4
    session = Session.open(str(output / "activations" / samples[0].rollouts[0].session_id))
    assert verify(session).rollouts == 4

    port = str(free_port("127.0.0.1"))
    move_to_a_bucket(cloud, *options, "--port", port)
    assert cloud.hosts == 1
    doctor = cloud.roentgen("doctor", NAME, "--port", port)
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


def move_to_a_bucket(cloud: Cloud, *options: str) -> None:
    """Reuse the running cluster with another store and port; the S3 server answers only who has the keys given here."""
    with s3_endpoint(cloud.folder / "s3.log", GATEWAY) as endpoint:
        bucket = {"AWS_ENDPOINT_URL_S3": endpoint, **lock(endpoint)}
        words = ("up", *options, "--reuse", "--skip-sync", "--store", f"s3://{BUCKET}/activations")
        reused = cloud.roentgen(*words, **bucket)
        assert reused.returncode == 0, reused.stderr[-6000:]
        assert bucket["AWS_SECRET_ACCESS_KEY"] not in reused.stdout + reused.stderr
        stored = [line for line in (cloud.folder / "s3.log").read_text().splitlines() if '"PUT' in line]
        assert any(f"/{BUCKET}/activations/smoke-" in line and " 200 " in line for line in stored), stored
