"""The main job as a user runs it: the `roentgen` command, real processes, SmolLM2-135M, real GSM8K problems."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from roentgen.runs import Run
from roentgen.serving.local_server import free_port
from roentgen.store import Session, verify
from tests.conftest import ROENTGEN, RayHome, Server
from tests.reference import teacher_forced, worst_error

pytestmark = pytest.mark.integration
LAYERS = [8, 12, 16]


def roentgen(home: RayHome, *arguments: str, timeout: float = 500) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROENTGEN, *arguments], env=home.environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def eval_options(problems: Path | str, output: Path, samples: int, base_url: str | None = None) -> list[str]:
    options = ["eval", "--problems", str(problems), "--samples", str(samples), "--output", str(output)]
    options += ["--max-tokens", "24", "--parallel", "16", "--collect-activations"]
    return options + (["--base-url", base_url] if base_url else [])


@pytest.fixture(scope="module")
def gsm8k_run(server: Server, gsm8k_test: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """32 real problems, with activations at the default layers and hook points."""
    output = tmp_path_factory.mktemp("runs") / "gsm8k"
    home = RayHome(str(tmp_path_factory.mktemp("ray")))
    done = roentgen(RayHome("/tmp/rt-run"), *eval_options(gsm8k_test, output, 32, server.base_url))
    assert done.returncode == 0, done.stderr
    assert home.processes() == []
    return Run(output)


def test_every_problem_has_one_sample_and_all_its_rows(gsm8k_run: Run) -> None:
    samples = gsm8k_run.read_samples()
    assert len({s.problem_id for s in samples}) == len(samples) == 32
    session = Session.open(samples[0].rollouts[0].uri)
    rollouts = session.rollouts().set_index("rollout_id")
    assert len(rollouts) == 32
    for sample in samples:
        (ref,) = sample.rollouts
        row = rollouts.loc[ref.rollout_id]
        expected = sample.prompt_tokens + sample.completion_tokens - 1
        assert row["row_stop"] - row["row_start"] == ref.row_stop - ref.row_start == expected
        assert row["problem_id"] == sample.problem_id
        assert row["config_hash"] == gsm8k_run.config.config_hash
        assert sample.question in row["text"]
        assert {key: tuple(t.shape) for key, t in ref.tensors.items()} == {
            f"layers.{layer}.{hook}": (expected, 576) for hook in ("ln_attn", "ln_mlp") for layer in LAYERS
        }
    assert verify(session).ok


def test_three_rollouts_equal_a_teacher_forced_forward(gsm8k_run: Run) -> None:
    samples = sorted(gsm8k_run.read_samples(), key=lambda s: s.prompt_tokens)
    session = Session.open(samples[0].rollouts[0].uri)
    rollouts = session.rollouts()
    for sample in (samples[0], samples[16], samples[-1]):  # the shortest, a middling and the longest prompt
        where = rollouts[rollouts["rollout_id"] == sample.rollouts[0].rollout_id]
        expected = teacher_forced(where["token_ids"].iloc[0][:-1], LAYERS)
        for layer in LAYERS:
            for hook_point in ("ln_attn", "ln_mlp"):
                key = f"layers.{layer}.{hook_point}"
                assert worst_error(session.activations(key, where=where)[0].values, expected[key]) <= 1e-4


def test_the_summary_agrees_with_the_samples(gsm8k_run: Run) -> None:
    """Recounted from the files that the seed's users read, without our code."""
    lines = [json.loads(line) for line in gsm8k_run.record_path.read_text().splitlines()]
    summary = json.loads((gsm8k_run.path / "summary.json").read_text())
    assert summary["complete"] is True
    assert summary["accuracy"]["value"] == sum(line["correct"] for line in lines) / 32
    assert summary["truncated"] == sum(line["finish_reason"] == "length" for line in lines)
    for number in range(1, 33):
        name = f"test_{number:04d}"  # GSM8K here is a file called test.jsonl
        one = json.loads((gsm8k_run.path / "samples" / f"{name}.json").read_text())
        assert one["activations"]
        roles = [json.loads(line)["role"] for line in (gsm8k_run.path / f"trajectories/{name}.jsonl").open()]
        assert roles[-1] == "assistant"
        assert (gsm8k_run.path / "agent_states" / f"{name}.json").exists()
    assert len((gsm8k_run.path / "dataset.jsonl").read_text().splitlines()) == 32
    assert "<html" in (gsm8k_run.path / "report.html").read_text()


def test_running_it_again_does_nothing(gsm8k_run: Run, server: Server, gsm8k_test: Path, ray_home: RayHome) -> None:
    before = gsm8k_run.record_path.read_bytes()
    done = roentgen(ray_home, *eval_options(gsm8k_test, gsm8k_run.path, 32, server.base_url))
    assert done.returncode == 0, done.stderr
    assert "nothing to run" in done.stderr
    assert gsm8k_run.record_path.read_bytes() == before


def test_another_configuration_in_the_same_folder_is_refused(
    gsm8k_run: Run, server: Server, gsm8k_test: Path, ray_home: RayHome
) -> None:
    options = eval_options(gsm8k_test, gsm8k_run.path, 32, server.base_url)
    done = roentgen(ray_home, *options, "--temperature", "0.7")
    assert done.returncode == 2
    assert "sampling.temperature: 0.0 in the folder, 0.7 requested" in done.stderr


def test_probes_train_on_the_run(gsm8k_run: Run, ray_home: RayHome) -> None:
    """SmolLM2 cut at 24 tokens solves none of these, which is its own exit code; and every one is cut, likewise."""
    for label in ("correct", "truncated"):
        values = {s.correct if label == "correct" else s.finish_reason == "length" for s in gsm8k_run.read_samples()}
        done = roentgen(ray_home, "probe", "train", str(gsm8k_run.path), "--label", label)
        if len(values) == 1:
            assert done.returncode == 3, done.stderr
            assert "needs both classes" in done.stderr
        else:
            assert done.returncode in (0, 3), done.stderr


def test_a_killed_driver_loses_and_repeats_nothing(
    server: Server, gsm8k_test: Path, tmp_path: Path, ray_home: RayHome
) -> None:
    options = [
        *eval_options(gsm8k_test, tmp_path / "run", 24, server.base_url),
        "--parallel",
        "4",
        "--max-tokens",
        "12",
    ]
    driver = subprocess.Popen([ROENTGEN, *options], env=ray_home.environment, stderr=subprocess.DEVNULL)
    record = tmp_path / "run" / "samples.jsonl"
    deadline = time.monotonic() + 200
    while not (record.exists() and record.read_bytes().count(b"\n") >= 6):
        assert driver.poll() is None, "the driver ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    kept = list(Run(tmp_path / "run").read_samples())
    assert 6 <= len(kept) < 24
    assert ray_home.wait_until_gone() == []

    done = roentgen(ray_home, *options)
    assert done.returncode == 0, done.stderr
    assert "continuing" in done.stderr
    run = Run(tmp_path / "run")
    lines = [json.loads(line)["problem_id"] for line in run.record_path.read_text().splitlines()]
    assert len(lines) == len(set(lines)) == 24
    assert list(run.read_samples()[: len(kept)]) == kept
    # The store may hold a rollout twice that was acknowledged to the driver that died; it counts once.
    session = Session.open(kept[0].rollouts[0].uri)
    assert len(session.rollouts()) == 24
    assert {s.rollouts[0].rollout_id for s in run.read_samples()} <= set(session.rollouts(unique=False)["rollout_id"])


def test_without_a_server_it_starts_one_and_leaves_nothing_running(tmp_path: Path, ray_home: RayHome) -> None:
    options = ["eval", "--samples", "2", "--parallel", "2", "--max-tokens", "16", "--collect-activations"]
    done = roentgen(
        ray_home, *options, "--output", str(tmp_path / "run"), "--store", str(tmp_path / "store"), "--layers", "0,-1",
        "--hook-points", "resid_post", "--positions", "last_prompt",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "raylet" not in done.stdout + done.stderr  # nor any other word of what runs below
    assert ray_home.wait_until_gone() == []
    samples = Run(tmp_path / "run").read_samples()
    assert [s.error for s in samples] == [None, None]
    listed = roentgen(ray_home, "sessions", "list", str(tmp_path / "store"))
    assert samples[0].rollouts[0].session_id[:20] in listed.stdout
    session = str(tmp_path / "store" / samples[0].rollouts[0].session_id)
    assert "layers.29.resid_post" in roentgen(ray_home, "sessions", "show", session).stdout
    assert "2 rollouts verified, 0 damaged" in roentgen(ray_home, "sessions", "verify", session).stdout


def test_a_job_on_a_running_cluster(tmp_path: Path, ray_home: RayHome) -> None:
    """`ray start`, `roentgen serve` on it, `ray job submit -- python -m eval_jobs`."""
    ports = [free_port("127.0.0.1") for _ in range(5)]
    gcs, dashboard, agent, client, http = map(str, ports)
    ray = str(Path(sys.executable).parent / "ray")
    environment = {
        **ray_home.environment,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    head = [
        ray,
        "start",
        "--head",
        "--port",
        gcs,
        "--dashboard-port",
        dashboard,
        "--dashboard-agent-listen-port",
        agent,
    ]
    # 127.0.0.2 is loopback too; Ray takes "127.0.0.1" to mean this machine's outward address.
    head += ["--ray-client-server-port", client, "--node-ip-address", "127.0.0.2", "--temp-dir", ray_home.path]
    subprocess.run([*head, "--disable-usage-stats"], env=environment, check=True, capture_output=True, timeout=120)
    serve = subprocess.Popen(
        [ROENTGEN, "serve", "--ray-address", f"127.0.0.2:{gcs}", "--port", http, "--store", str(tmp_path / "store")],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert serve.stdout is not None
    said: list[str] = []
    while "Ctrl-C" not in (line := serve.stdout.readline()):
        assert line, "".join(said)
        said.append(line)
    job = [ray, "job", "submit", "--address", f"http://127.0.0.1:{dashboard}", "--"]
    job += [
        "python",
        "-m",
        "eval_jobs",
        "--base-url",
        f"http://127.0.0.1:{http}/v1",
        "--samples",
        "3",
        "--parallel",
        "3",
    ]
    job += ["--max-tokens", "8", "--collect-activations", "--output", str(tmp_path / "run")]
    done = subprocess.run(job, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    samples = Run(tmp_path / "run").read_samples()
    assert len(samples) == 3
    assert verify(Session.open(samples[0].rollouts[0].uri)).rollouts == 3
    serve.terminate()
    assert serve.wait(60) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", "--model", "./no/such/model"], "no such folder"),
        (["eval", "--problems", "nowhere.jsonl"], "nowhere.jsonl"),
        (["eval", "--layers", "eight"], "--layers"),
        (["eval", "--positions", "everywhere"], "not a position policy"),
        (["eval", "--ray-address", "auto"], "wrong one"),
        (["eval", "--base-url", "http://127.0.0.1:9/v1"], "no server answers"),
        (["eval", "--dtype", "float8"], "--dtype"),
        (["serve", "--host", "0.0.0.0"], "ROENTGEN_API_KEY"),
        (["serve", "--store", "/proc/nowhere"], "not writable"),
        (["sessions", "verify", "nowhere"], "not a session"),
        (["probe", "train", "nowhere"], "not a run directory"),
    ],
)
def test_bad_input_is_one_clear_line(arguments: list[str], words: str, ray_home: RayHome, tmp_path: Path) -> None:
    environment = {**ray_home.environment, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [ROENTGEN, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert ray_home.wait_until_gone() == []


def test_a_malformed_line_is_named_before_anything_runs(tmp_path: Path, ray_home: RayHome) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text('{"question": "1 + 1?", "answer": "#### 2"}\n{"question": "2 + 2?"\n')
    done = roentgen(ray_home, "eval", "--problems", str(file), "--samples", "2")
    assert done.returncode == 2
    assert "problems.jsonl, line 2" in done.stderr
    assert "starting Ray" not in done.stderr


def test_a_layer_out_of_range_stops_the_run_and_says_what_there_is(
    server: Server, tmp_path: Path, ray_home: RayHome
) -> None:
    options = eval_options("arithmetic", tmp_path / "run", 4, server.base_url)
    done = roentgen(ray_home, *options, "--layers", "40")
    assert done.returncode == 2
    assert "smollm2-135m has layers 0–29" in done.stderr
