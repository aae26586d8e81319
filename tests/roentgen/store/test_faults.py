"""The store under real faults: full and read-only disks, killed writers, a bucket that rejects requests.

After each fault, acknowledged rollouts are readable and correct, others are complete or absent, and `remove_unused` removes
only garbage.
"""

import contextlib
import errno
import http.server
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from roentgen.store import Receipt, Session, StoreWriter, verify
from roentgen.store.merging import remove_unused
from tests.roentgen.store.conftest import KEYS, RolloutFactory

pytestmark = pytest.mark.faults
KILLS = int(os.environ.get("ROENTGEN_KILLS", "40"))


def write_without_end(store: str, name: str, said: Connection) -> None:
    """Write rollouts whose values follow from their number, merge often, and say each one that is acknowledged."""
    make = RolloutFactory()

    def say(number: int, future: "Future[Receipt]") -> None:
        said.send_bytes(f"{number} {future.result().rollout_id}".encode())

    with StoreWriter(store, max_wait_s=0.002, merge_shards=4) as writer:
        said.send_bytes(b"ready")
        for number in itertools.count():
            rollout = make(number % 7 + 1, number % 5 + 1, problem=f"{name}-{number}", d=64)
            for key in KEYS:
                rollout.tensors[key].fill_(number % 128)
            future = writer.submit(rollout)
            future.add_done_callback(partial(say, number))
            if number % 5 == 0:
                future.result()


def check(uri: str, acknowledged: dict[str, str]) -> None:
    """Compare a session with what its writers were told is durable: problem by rollout id."""
    session = Session.open(uri)
    report = verify(session)
    assert report.damage == []
    frame = session.rollouts()
    there = dict(zip(frame["rollout_id"], frame["problem_id"], strict=True))
    assert len(set(there.values())) == len(there)
    assert acknowledged.items() <= there.items()
    for key in KEYS:
        for item in session.activations(key, where=frame):
            number = int(there[item.rollout_id].rpartition("-")[2])
            assert item.values.shape == (number % 7 + 1 + number % 5, 64)
            assert (item.values == number % 128).all()


def test_a_writer_killed_at_any_moment_loses_nothing_acknowledged(tmp_path: Path) -> None:
    dice, acknowledged = random.Random(0), dict[str, str]()
    # Each writer is forked from a process that has imported everything, which saves seconds a kill.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    for kill in range(KILLS):
        hears, says = processes.Pipe(duplex=False)
        writer = processes.Process(target=write_without_end, args=(str(tmp_path), f"w{kill}", says))
        writer.start()
        says.close()
        assert hears.recv_bytes() == b"ready"
        time.sleep(dice.uniform(0.0, 0.4))
        writer.kill()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        with contextlib.suppress(EOFError):
            while said := hears.recv_bytes().decode().split():
                acknowledged[said[1]] = f"w{kill}-{said[0]}"
    assert len(acknowledged) > KILLS
    check(str(tmp_path / "s"), acknowledged)
    remove_unused(Session.open(tmp_path / "s"), grace_s=0)
    check(str(tmp_path / "s"), acknowledged)
    assert verify(Session.open(tmp_path / "s")).orphans == []
    assert not list(tmp_path.rglob("*.tmp"))


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[None]:
    """Mount a small file system in memory at a folder."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_fails_what_does_not_fit_and_nothing_else(tmp_path: Path, rollout: RolloutFactory) -> None:
    disk, made, failed = tmp_path / "disk", {}, 0
    with mounted(disk, "2m"):
        with StoreWriter(disk, max_wait_s=0) as writer:
            for _ in range(40):
                one = rollout(n_prompt=100, d=256)
                try:
                    made[writer.submit(one).result().rollout_id] = one
                except OSError as error:
                    failed += error.errno == errno.ENOSPC
            assert len(made) + failed == 40
            assert made
            assert failed
            session = Session.open(disk / "s")
            report = verify(session)
            assert (report.rollouts, report.damage) == (len(made), [])
            assert not list(disk.rglob("*.tmp"))
            remove_unused(session, grace_s=0)  # the shards whose index did not fit make room again
            small = rollout()
            made[writer.submit(small).result().rollout_id] = small
        for item in Session.open(disk / "s").activations(KEYS[0]):
            assert torch.equal(item.values, made[item.rollout_id].tensors[KEYS[0]])


def test_a_disk_that_becomes_read_only_fails_loudly_and_recovers(tmp_path: Path, rollout: RolloutFactory) -> None:
    disk = tmp_path / "disk"
    with mounted(disk, "8m"), StoreWriter(disk, max_wait_s=0) as writer:
        writer.submit(rollout()).result()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(OSError, match="Read-only file system"):
            writer.submit(rollout()).result()
        assert verify(Session.open(disk / "s")).rollouts == 1
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        writer.submit(rollout()).result()
        report = verify(Session.open(disk / "s"))
        assert (report.rollouts, report.damage) == (2, [])


HOP = ("content-length", "transfer-encoding", "expect", "connection", "host")
"""Headers that concern one connection only."""


class Faults:
    """How a proxy in front of a bucket treats PUT requests."""

    refuse = 0.0
    cut = 0.0
    delay_s = 0.0


@contextmanager
def faulty(endpoint: str, faults: Faults) -> Iterator[str]:
    """Run a proxy before an S3 endpoint that refuses, cuts or delays what is put; yields its address."""
    dice, guard = random.Random(1), threading.Lock()

    class Proxy(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass(self) -> None:
            body = self._body()
            puts = self.command in ("PUT", "POST") and "delete" not in self.path
            with guard:
                refused, cut = dice.random() < faults.refuse, dice.random() < faults.cut
            if puts and cut:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if puts and refused:
                self._answer(503, {"Content-Type": "application/xml"}, b"<Error><Code>SlowDown</Code></Error>")
                return
            if puts:
                time.sleep(faults.delay_s)
            headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP}
            request = urllib.request.Request(endpoint + self.path, body or None, headers, method=self.command)
            try:
                with urllib.request.urlopen(request, timeout=30) as reply:
                    self._answer(reply.status, dict(reply.headers), reply.read())
            except urllib.error.HTTPError as error:
                self._answer(error.code, dict(error.headers), error.read())

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while length := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date"):
                    self.send_header(name, value)
            length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
            self.send_header("Content-Length", length)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass  # noqa: N815 - http.server's names

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("store", ["bucket"], indirect=True)
@pytest.mark.parametrize(("refuse", "cut", "delay_s"), [(0.1, 0.1, 0.1), (0.6, 0.0, 0.0), (0.0, 0.5, 0.0)])
def test_a_bucket_that_fails_loses_nothing_acknowledged(
    store: str,
    endpoint: str,
    rollout: RolloutFactory,
    monkeypatch: pytest.MonkeyPatch,
    refuse: float,
    cut: float,
    delay_s: float,
) -> None:
    faults, made, failed = Faults(), {}, 0
    with faulty(endpoint, faults) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        with StoreWriter(store, max_wait_s=0) as writer:
            one = rollout()
            made[writer.submit(one).result().rollout_id] = one
            faults.refuse, faults.cut, faults.delay_s = refuse, cut, delay_s
            for _ in range(6):
                one = rollout()
                waiting = writer.submit(one)
                assert wait([waiting], timeout=120).done  # in time, whatever comes
                try:
                    made[waiting.result().rollout_id] = one
                except OSError:
                    failed += 1
            faults.refuse = faults.cut = faults.delay_s = 0.0
            one = rollout()
            made[writer.submit(one).result().rollout_id] = one
        session = Session.open(f"{store}/s")
        report = verify(session)
        assert report.damage == []
        frame = session.rollouts()
        assert set(made) <= set(frame["rollout_id"])
        assert len(frame) <= len(made) + failed
        for item in session.activations(KEYS[0], where=frame[frame["rollout_id"].isin(list(made))]):
            assert torch.equal(item.values, made[item.rollout_id].tensors[KEYS[0]])
        remove_unused(session, grace_s=0)
        assert verify(Session.open(f"{store}/s")).rollouts == report.rollouts


def test_what_is_acknowledged_was_flushed_in_the_right_order(tmp_path: Path) -> None:
    """SIGKILL keeps the page cache, so a missing fsync shows only in the order of the system calls."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed: `make test-faults` installs it as root")
    log, ready = tmp_path / "calls", 'print("it-is-durable", flush=True)'
    script = (
        "import sys; from roentgen.store import StoreWriter; from tests.roentgen.store.conftest import RolloutFactory\n"
        f"with StoreWriter(sys.argv[1], max_wait_s=0) as w: w.submit(RolloutFactory()()).result(); {ready}"
    )
    calls = "trace=fsync,fdatasync,rename,renameat,renameat2,write,openat"
    traced = [sys.executable, "-c", script, str(tmp_path / "store")]
    subprocess.run(["strace", "-f", "-y", "-e", calls, "-o", str(log), *traced], check=True, capture_output=True)
    steps = []
    for line in log.read_text().splitlines():
        if match := re.search(r"(fsync|fdatasync)\(\d+<(.*?)>", line):
            steps.append(("flush", match[2]))
        elif match := re.search(r'rename\w*\((?:[^"]*)"(.*?)",(?:[^"]*)"(.*?)"', line):
            steps.append(("name", match[1] + " " + match[2]))
        elif "it-is-durable" in line and "write(" in line:
            steps.append(("acknowledge", ""))
    session = tmp_path / "store" / "s"
    assert json.loads((session / "session.json").read_text())["name"] == "s"

    def at(kind: str, part: str, after: int) -> int:
        found = [n for n, (k, what) in enumerate(steps) if k == kind and re.search(part, what) and n > after]
        assert found, (kind, part, steps)
        return found[0]

    shard = at("flush", r"shards/\.\w+\.safetensors", -1)
    shard = at("name", r"shards/\S+ .*shards/\w+\.safetensors", shard)
    shard = at("flush", r"/s/shards$", shard)
    index = at("flush", r"index/\.\w+\.parquet", shard)
    index = at("name", r"index/\S+ .*index/\w+\.parquet", index)
    index = at("flush", r"/s/index$", index)
    at("acknowledge", "", index)
    assert steps.index(("acknowledge", "")) > index
