"""The real things that integration tests run against: a served model, and GSM8K where it can be found."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from hypothesis import settings

from roentgen.serving.local_server import free_port
from tests.disk import DiskCalls
from tests.rotation import pytest_addoption, pytest_collection_modifyitems

# How long an example takes says something of the machine only.
settings.register_profile("roentgen", deadline=None)
settings.load_profile("roentgen")

__all__ = ["pytest_addoption", "pytest_collection_modifyitems"]  # pytest's own hooks

GSM8K = Path(os.environ.get("ROENTGEN_GSM8K_DIR", Path(__file__).parents[2] / "shared" / "gsm8k"))
# Clients that nobody here wrote have an environment of their own: `make test-clients`.
collect_ignore = [] if importlib.util.find_spec("schemathesis") else ["clients"]

# Ray gives its workers, replicas among them, the lowest priority but four: beside busy unit tests they would hardly run.
os.environ.setdefault("RAY_worker_niceness", "0")
# And a thread of torch's that waits for another gives its core away, instead of spinning while the other has none.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ROENTGEN = os.environ.get("ROENTGEN") or str(Path(sys.executable).parent / "roentgen")


@pytest.fixture(scope="session")
def gsm8k_test() -> Path:
    """GSM8K's test split, which is not part of the project."""
    file = GSM8K / "test.jsonl"
    if not file.exists():
        pytest.skip(f"GSM8K is not here: {file} does not exist; set ROENTGEN_GSM8K_DIR to a folder with test.jsonl")
    return file


@pytest.fixture
def disk_calls(monkeypatch: pytest.MonkeyPatch) -> DiskCalls:
    """Record this process's flushes and renames, in order."""
    return DiskCalls(monkeypatch)


@dataclass(frozen=True)
class RayHome:
    """A temporary folder that the Ray of one test writes to; its path marks every process of that Ray."""

    path: str

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "RAY_TMPDIR": self.path, "RAY_USAGE_STATS_ENABLED": "0", "ROENTGEN_API_KEY": ""}

    def processes(self) -> list[psutil.Process]:
        """Return what still runs of it."""
        found = []
        for process in psutil.process_iter():
            try:
                if any(self.path in part for part in process.cmdline()):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        return found

    def told(self) -> str:
        """Return what it has said and what runs, for whoever has to find out why a test has failed."""
        logs = [Path(self.path) / "serve.log", *sorted(Path(self.path).glob("session_latest/logs/serve/*.log"))]
        said = [f"{log.name}:\n{log.read_text(errors='replace')[-2000:]}" for log in logs if log.exists()]
        table = psutil.process_iter(["pid", "ppid", "name", "status", "cmdline"])
        running = [
            f"{of['pid']} of {of['ppid']}, {of['status']}: {of['name']}, {' '.join(of['cmdline'] or [])[:80]}"
            for of in (process.info for process in table)
            if of["ppid"] != 2  # the kernel's own
        ]
        return "\n".join([*said, *running])

    def wait_until_gone(self, seconds: float = 30) -> list[psutil.Process]:
        """Wait until nothing of it runs; return what does after all."""
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return left


@pytest.fixture
def ray_home() -> Iterator[RayHome]:
    home = RayHome(tempfile.mkdtemp(prefix="rt-", dir="/tmp"))  # short: Ray's socket paths have a limit
    yield home
    clean_up(home)


def clean_up(home: RayHome) -> None:
    for process in home.processes():
        process.kill()
    shutil.rmtree(home.path, ignore_errors=True)


@dataclass(frozen=True)
class Server:
    """A running `roentgen serve`."""

    base_url: str
    store: Path
    process: subprocess.Popen[str]

    @property
    def probes(self) -> Path:
        """The folder whose saved probes requests may name; empty at first."""
        return self.store / "probes"

    @property
    def root(self) -> str:
        return self.base_url.removesuffix("/v1")


def start_server(
    store: Path, home: RayHome, *options: str, environment: dict[str, str] | None = None, timeout_s: float = 300
) -> Server:
    """Start `roentgen serve` on Ray Serve, on a free port, and wait until it answers."""
    port = free_port("127.0.0.1")
    command = [ROENTGEN, "serve", "--port", str(port), "--store", str(store), "--dtype", "float32"]
    command += ["--ray-address", "local", *options]
    (store / "probes").mkdir(parents=True, exist_ok=True)
    command += ["--probes", str(store / "probes")]
    log = open(f"{home.path}/serve.log", "w")  # noqa: SIM115 - the process writes to it for as long as it runs
    process = subprocess.Popen(
        command, env=home.environment | (environment or {}), stdout=log, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert process.poll() is None, Path(log.name).read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
                if json.load(response)["status"] == "ok":
                    return Server(f"http://127.0.0.1:{port}/v1", store, process)
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.3)
    process.kill()
    raise AssertionError("the server did not start: " + Path(log.name).read_text())


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """SmolLM2-135M in float32, served for the whole session; nothing of it is left behind."""
    home = RayHome(tempfile.mkdtemp(prefix="rt-", dir="/tmp"))
    running = start_server(tmp_path_factory.mktemp("store"), home)
    yield running
    running.process.send_signal(signal.SIGTERM)
    try:
        assert running.process.wait(60) == 0
        assert home.wait_until_gone() == []
    finally:
        running.process.kill()
        clean_up(home)
