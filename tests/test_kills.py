"""Exactly once, by causing what breaks it: SIGKILL of the driver, a worker or the model's replica at random moments, over and
over, and then the same samples as an evaluation that nobody disturbed.

`make test-faults` runs six kills; `ROENTGEN_EVAL_KILLS=60` as many as you like, on more problems. `ROENTGEN_EVAL_KILLS_SEED`
repeats the moments of a run, as far as moments can be repeated.
"""

import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from roentgen.runs import Run, Sample
from roentgen.store import Session, verify
from tests.conftest import ROENTGEN, RayHome, Server, clean_up, start_server
from tests.reference import smollm2

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]

KILLS = int(os.environ.get("ROENTGEN_EVAL_KILLS", "6"))
SEED = int(os.environ.get("ROENTGEN_EVAL_KILLS_SEED", time.time_ns() % 100_000))
PROBLEMS = 8 * KILLS
VICTIMS = ("driver", "worker", "replica")
NEAR = 0.01
"""Logits so close are one choice: float32 sums come out in another order in another batch."""


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    """A server whose replicas may be killed."""
    home = RayHome(tempfile.mkdtemp(prefix="rt-", dir="/tmp"))
    running = start_server(tmp_path / "store", home)
    yield running
    running.process.send_signal(signal.SIGTERM)
    running.process.wait(60)
    clean_up(home)


@dataclass(frozen=True)
class Evaluation:
    """The command, to be started as often as it takes."""

    server: Server
    output: Path
    home: RayHome

    def start(self) -> subprocess.Popen[str]:
        command = [ROENTGEN, "eval", "--base-url", self.server.base_url, "--samples", str(PROBLEMS), "--parallel", "8"]
        command += ["--max-tokens", "32", "--collect-activations", "--layers", "12", "--hook-points", "resid_post"]
        with open(f"{self.home.path}/eval.log", "a") as log:
            return subprocess.Popen(
                [*command, "--output", str(self.output)],
                env=self.home.environment, stdout=log, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip

    def recorded(self) -> list[Sample]:
        return list(Run(self.output).read_samples()) if (self.output / "config.json").exists() else []

    def said(self) -> str:
        return Path(f"{self.home.path}/eval.log").read_text()


def victim(kind: str, driver: subprocess.Popen[str], server: Server) -> psutil.Process | None:
    """Find the process to kill; None while there is none, such as while a killed replica's successor starts."""
    if kind == "driver":
        return psutil.Process(driver.pid) if workers(driver) else None
    if kind == "worker":
        return next(iter(workers(driver)), None)
    return next(iter(named(server.process, "ServeReplica:roentgen:model")), None)


def workers(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the processes of Ray tasks that have rollouts in flight."""
    return named(driver, "_run_slice")


def named(parent: subprocess.Popen[str], words: str) -> list[psutil.Process]:
    found = []
    try:
        for process in psutil.Process(parent.pid).children(recursive=True):
            try:
                if words in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
    except psutil.NoSuchProcess:
        return []
    return found


def run_under_fire(evaluation: Evaluation, chance: random.Random) -> list[str]:
    """Kill and start again until every problem has an answer; return what was killed."""
    killed: list[str] = []
    driver = evaluation.start()
    deadline = time.monotonic() + 120 + 60 * KILLS
    while True:
        assert time.monotonic() < deadline, f"not done after {killed}: {evaluation.said()[-3000:]}"
        if driver.poll() is not None:
            if driver.returncode == 0:
                return killed
            # Killed; or it gave up a problem that was in flight at three deaths (1), or the server, which was without a
            # replica for longer than requests are tried again (2). The next start goes on.
            assert driver.returncode in (-signal.SIGKILL, 1, 2), evaluation.said()[-3000:]
            driver = evaluation.start()
        kind = VICTIMS[len(killed) % len(VICTIMS)]
        if len(killed) < KILLS and victim(kind, driver, evaluation.server) is not None:
            time.sleep(chance.uniform(0, 4))
            if (process := victim(kind, driver, evaluation.server)) is not None:
                process.kill()
                killed.append(kind)
        time.sleep(0.1)


def test_killed_again_and_again_every_problem_has_its_one_sample(
    own_server: Server, tmp_path: Path, ray_home: RayHome
) -> None:
    print(f"ROENTGEN_EVAL_KILLS={KILLS} ROENTGEN_EVAL_KILLS_SEED={SEED}")
    calm = Evaluation(own_server, tmp_path / "calm", ray_home)
    assert calm.start().wait(600) == 0, calm.said()
    disturbed = Evaluation(own_server, tmp_path / "disturbed", ray_home)
    killed = run_under_fire(disturbed, random.Random(SEED))
    assert set(killed) == set(VICTIMS)
    assert "Traceback" not in disturbed.said()

    run, expected = Run(disturbed.output), {sample.problem_id: sample for sample in calm.recorded()}
    lines = [Sample.model_validate_json(line) for line in run.record_path.read_text().splitlines()]
    answered = [line.identity for line in lines if line.error is None]
    assert len(answered) == len(set(answered)) == PROBLEMS  # nothing recorded twice, failures of a moment aside
    assert {sample.problem_id for sample in run.read_samples()} == expected.keys()
    assert (run.summary() or {})["complete"] is True
    for sample in run.read_samples():
        explain(sample, expected[sample.problem_id])

    session = run.session_uri(run.read_samples()[0].rollouts[0])
    done = subprocess.run(
        [ROENTGEN, "sessions", "gc", session, "--run", str(run.path), "--older-than", "0"],
        env=ray_home.environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    print(killed, done.stdout.splitlines()[-1])
    kept = Session.open(session).rollouts(unique=False)["rollout_id"]
    assert sorted(kept) == sorted(ref.rollout_id for sample in run.read_samples() for ref in sample.rollouts)
    report = verify(Session.open(session))
    assert report.ok
    assert (report.rollouts, report.orphans) == (PROBLEMS, [])


def explain(sample: Sample, expected: Sample) -> None:
    """Accept the same answer, or one that parts from it where the model's two best tokens are as good as equal."""
    if sample.messages == expected.messages:
        return
    one, other = tokens(sample), tokens(expected)
    parting = next(place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    with torch.inference_mode():
        logits = smollm2()(input_ids=torch.tensor([one[:parting]])).logits[0, -1]
    margin = float((logits[one[parting]] - logits[other[parting]]).abs())
    print(f"{sample.problem_id} parts at token {parting}, where the logits differ by {margin:.2g}")
    assert margin < NEAR


def tokens(sample: Sample) -> list[int]:
    """Return the tokens of a sample's conversation, as they are stored beside its activations."""
    (ref,) = sample.rollouts
    rollouts = Session.open(ref.uri).rollouts().set_index("rollout_id")
    return [int(token) for token in rollouts.loc[ref.rollout_id, "token_ids"]]
