"""What a cluster is for, and what happens to it: spread replicas, a lost node, a node that comes back, a killed driver, load.

The store is a folder that all nodes see, and then a bucket.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from roentgen.runs import Run
from roentgen.store import Session
from tests.cluster.cluster import Cluster, wait_until
from tests.cluster.nodes import Node
from tests.conftest import ROENTGEN
from tests.reference import teacher_forced, worst_error
from tests.s3 import BUCKET

PROBLEMS = 40
CHAT = {"model": "smollm2-135m", "messages": [{"role": "user", "content": "What is 2 + 2?"}], "max_tokens": 4}


def options(problems: Path, output: Path) -> list[str]:
    return [
        *("--problems", str(problems), "--samples", str(PROBLEMS), "--parallel", "12", "--max-tokens", "24"),
        *("--collect-activations", "--output", str(output), "--request-timeout", "300"),
    ]


def recorded(output: Path) -> int:
    record = output / "samples.jsonl"
    return record.read_bytes().count(b"\n") if record.exists() else 0


def check_run(output: Path, store: str) -> None:
    """Every problem once, every activation there and true to the text that it belongs to."""
    run = Run(output)
    samples = run.read_samples()
    lines = run.record_path.read_text().splitlines()
    assert len(lines) == len({sample.problem_id for sample in samples}) == PROBLEMS
    assert [sample.error for sample in samples] == [None] * PROBLEMS
    (uri,) = {ref.uri for sample in samples for ref in sample.rollouts}
    assert uri.startswith(f"{store}/")
    session = Session.open(uri)
    # A reply that was lost with its node was asked for again: the store may hold a rollout twice, and counts it once.
    assert len(session.rollouts()) == PROBLEMS
    verified = subprocess.run([ROENTGEN, "sessions", "verify", uri], capture_output=True, text=True, check=False)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    everything = session.rollouts(unique=False).set_index("rollout_id")
    for sample in samples:
        (ref,) = sample.rollouts
        row = everything.loc[ref.rollout_id]
        assert row["problem_id"] == sample.problem_id
        assert sample.question in row["text"]
        expected = sample.prompt_tokens + sample.completion_tokens - 1
        where = everything.loc[[ref.rollout_id]].reset_index()
        for key in ref.tensors:
            values = session.activations(key, where=where)[0].values
            assert values.shape == (expected, 576)
            assert torch.isfinite(values.float()).all()
    for sample in samples[::16]:
        where = everything.loc[[sample.rollouts[0].rollout_id]].reset_index()
        expected_values = teacher_forced(where["token_ids"].iloc[0][:-1], [8])["layers.8.ln_attn"]
        assert worst_error(session.activations("layers.8.ln_attn", where=where)[0].values, expected_values) <= 1e-4


def test_replicas_are_on_different_nodes_and_every_node_answers(cluster: Cluster) -> None:
    replicas = cluster.deployment("model")
    assert len({replica["node_ip"] for replica in replicas}) == len(replicas) == 2
    for node in cluster.hosts.nodes:
        answer = cluster.ask(node, "/v1/chat/completions", CHAT)
        assert answer.status == 200, answer.body


def test_launching_again_restarts_nothing(cluster: Cluster) -> None:
    before = {replica["replica_id"] for name in ("model", "ingress") for replica in cluster.deployment(name)}
    cluster.hosts.launch()
    assert before == {replica["replica_id"] for name in ("model", "ingress") for replica in cluster.deployment(name)}


def test_the_locks_hold(cluster: Cluster) -> None:
    """The server asks for its key, Ray for its token; the dashboard is on the head's loopback only."""
    assert cluster.ask(cluster.head, "/v1/models", key="another").status == 401
    assert cluster.ask(cluster.head, "/health", key="").status == 200
    status = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}"]
    assert cluster.head.run(*status, "http://127.0.0.1:8265/api/jobs/").strip() in ("401", "403")
    outside = cluster.workers[0].popen(*status, f"http://{cluster.head.ip}:8265/api/jobs/")
    assert outside.wait(30) == 7  # curl's code for a connection that was refused
    join = f"import ray; ray.init('{cluster.head.ip}:6379')"
    stranger = cluster.workers[0].popen(
        sys.executable, "-c", join, environment={"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    )
    said, _ = stranger.communicate(timeout=120)
    assert stranger.returncode != 0
    assert "token" in said.lower(), said
    names = ("ROENTGEN_API_KEY", "RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY")
    secrets = [cluster.hosts.environment[name] for name in names]
    for log in cluster.folder.glob("*.log"):
        assert not any(secret in log.read_text() for secret in secrets), log


def lose_a_node_during_a_run(cluster: Cluster, problems: Path, output: Path) -> Node:
    """Evaluate, and meanwhile lose a worker that has a replica; returns the worker when the run has finished all the same."""
    log = cluster.folder / f"{output.name}.log"
    job = cluster.submit(*options(problems, output), log=log)
    wait_until(lambda: recorded(output) >= 4 or job.poll() is not None, 240, log.read_text)
    assert job.poll() is None, log.read_text()
    lost = next(node for r in cluster.deployment("model") if (node := cluster.node_of(r)) is not cluster.head)
    lost.kill()
    assert recorded(output) < PROBLEMS, "the run was over before the node was lost"
    try:
        assert job.wait(420) == 0, log.read_text()
    except subprocess.TimeoutExpired:
        raise AssertionError(log.read_text()) from None
    return lost


def test_a_node_is_lost_while_an_evaluation_runs(cluster: Cluster, gsm8k_test: Path) -> None:
    """The run finishes, with each problem once; then the node comes back and serves."""
    output = cluster.folder / "lost-node"
    lost = lose_a_node_during_a_run(cluster, gsm8k_test, output)
    check_run(output, cluster.hosts.environment["STORE"])

    lost.start()
    cluster.hosts.launch()
    wait_until(lambda: cluster.ask(lost, "/v1/models").status == 200, 120, lambda: str(cluster.deployment("ingress")))
    answer = cluster.ask(lost, "/v1/chat/completions", CHAT)
    assert answer.status == 200, answer.body
    assert len({replica["node_ip"] for replica in cluster.deployment("model")}) == 2


def test_a_killed_driver_is_continued_by_another_submission(cluster: Cluster, gsm8k_test: Path) -> None:
    output = cluster.folder / "killed-driver"
    log = cluster.folder / "killed-driver.log"
    job = cluster.submit(*options(gsm8k_test, output), log=log)
    wait_until(lambda: recorded(output) >= 4 or job.poll() is not None, 240, log.read_text)
    cluster.head.run("pkill", "-KILL", "-f", "python -m eval_jobs")
    assert job.wait(120) != 0
    assert 4 <= recorded(output) < PROBLEMS
    kept = recorded(output)

    log = cluster.folder / "continued.log"
    job = cluster.submit(*options(gsm8k_test, output), log=log)
    assert job.wait(300) == 0, log.read_text()
    assert f"continuing: {kept} of {PROBLEMS} problems are already recorded" in log.read_text()
    check_run(output, cluster.hosts.environment["STORE"])


@pytest.mark.timeout(900)
def test_replicas_grow_with_the_load_of_an_evaluation(cluster: Cluster, gsm8k_test: Path) -> None:
    """One replica whose batch is full three times over gets a second, on another node, and is not restarted for it."""
    # In two steps: from two replicas that were asked for, Serve would go down to one only after ten quiet minutes.
    for more in ({"REPLICAS": "1"}, {"MAX_REPLICAS": "2"}):
        cluster.hosts.environment |= more
        cluster.hosts.launch()
        wait_until(lambda: len(cluster.deployment("model")) == 1, 120, lambda: str(cluster.deployment("model")))
    (first,) = cluster.deployment("model")

    log = cluster.folder / "growth.log"
    output = cluster.folder / "growth"
    load = ["--samples", "128", "--parallel", "96", "--max-tokens", "64", "--request-timeout", "600"]
    job = cluster.submit("--problems", str(gsm8k_test), *load, "--output", str(output), log=log)
    wait_until(lambda: len(cluster.deployment("model")) == 2 or job.poll() is not None, 400, log.read_text)
    assert job.poll() is None, log.read_text()
    replicas = cluster.deployment("model")
    assert len({replica["node_ip"] for replica in replicas}) == 2
    assert first["replica_id"] in {replica["replica_id"] for replica in replicas}
    assert job.wait(400) == 0, log.read_text()
    assert [sample.error for sample in Run(output).read_samples()] == [None] * 128

    del cluster.hosts.environment["MAX_REPLICAS"]
    cluster.hosts.environment["REPLICAS"] = "2"
    cluster.hosts.launch()
    assert len(cluster.deployment("model")) == 2


@pytest.mark.timeout(900)
def test_in_a_bucket_too_nothing_is_lost_with_a_node(
    cluster: Cluster, gsm8k_test: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The S3 server refuses whoever has not the keys; they reach the replicas from the launch."""
    cluster.hosts.environment["STORE"] = f"s3://{BUCKET}/activations"
    cluster.hosts.launch()
    smoke = f". ~/.roentgen/env && {ROENTGEN} smoke http://127.0.0.1:{cluster.port}"
    assert "rows of layers.0.resid_post" in cluster.head.run("bash", "-c", smoke)

    output = cluster.folder / "lost-node-bucket"
    lose_a_node_during_a_run(cluster, gsm8k_test, output)
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, cluster.hosts.environment[name])
    check_run(output, f"s3://{BUCKET}/activations")
    for node in cluster.hosts.nodes:
        assert os.stat(node.home / ".roentgen" / "aws").st_mode & 0o077 == 0
