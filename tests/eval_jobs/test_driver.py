"""Complete evaluations on a real local Ray: recorded once, continued after any interruption, stopped with clear messages."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from eval_jobs import EvalError, InterruptedRunError
from eval_jobs.driver import _stop_requests, run_evaluation
from eval_jobs.endpoint import FatalRequestError
from eval_jobs.resume import OtherConfigurationError
from eval_jobs.settings import check_settings
from roentgen.ray_connection import LOCAL
from roentgen.runs import Recorder, Run, RunError, Sample, recording
from tests.eval_jobs.conftest import take
from tests.eval_jobs.stand_in import KILL, Fault, StandIn

pytestmark = pytest.mark.usefixtures("local_ray")
SOON = {"Retry-After": "0.05"}


@pytest.fixture(autouse=True)
def _work_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def evaluate(server: StandIn, **values: Any) -> tuple[Run, str]:
    """Run an evaluation; return the run and its output."""
    settings = check_settings(**{"output": "run", "parallel": 4, "samples": 12, **values})
    shown = io.StringIO()
    problems = take(settings.problems, settings.samples)
    return run_evaluation(settings, problems, server.base_url, Console(file=shown, width=200)), shown.getvalue()


def recorded_lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.record_path.read_text().splitlines()]


def assert_complete(run: Run, samples: int = 12) -> None:
    ids = [line["problem_id"] for line in recorded_lines(run)]
    assert sorted(ids) == [f"arithmetic-{number:04d}" for number in range(1, samples + 1)]
    summary = run.summary()
    assert summary is not None
    assert summary["complete"] is True
    assert summary["accuracy"]["correct"] == sum(sample.correct for sample in run.read_samples()) == samples


def test_an_evaluation_leaves_the_whole_run_directory(server: StandIn, tmp_path: Path) -> None:
    run, shown = evaluate(server, collect_activations=True, layers="8,12")
    assert run.path == tmp_path / "run"
    assert_complete(run)
    assert "12/12 done, 12 correct" in shown
    present = {path.name for path in run.path.iterdir()}
    assert present == {
        "config.json", "samples.jsonl", "summary.json", "dataset.jsonl", "report.html",
        "audit.jsonl", "samples", "trajectories", "agent_states",
    }  # fmt: skip
    sample = run.read_samples()[0]
    assert sample.config_hash == run.config.config_hash == server.requests[0]["activations"]["key"]["config_hash"]
    assert sample.rollouts[0].session_id == run.config.run_id
    assert (run.summary() or {})["activations"]["keys"] == ["layers.12.ln_attn", "layers.8.ln_attn"]
    assert "100.0%" in (run.path / "report.html").read_text()


@pytest.mark.parametrize(
    ("is_own", "given", "joined"), [(True, None, LOCAL), (False, None, None), (True, "h:1", "h:1")]
)
def test_where_its_server_is_this_machine_s_its_tasks_are_too(
    server: StandIn, monkeypatch: pytest.MonkeyPatch, is_own: bool, given: str | None, joined: str | None
) -> None:
    """A cluster that the environment names may not reach a server of this machine."""
    asked: list[str | None] = []

    @contextmanager
    def watched(address: str | None, **_: Any) -> Iterator[None]:
        asked.append(address)
        yield

    monkeypatch.setattr("eval_jobs.driver.connected", watched)
    settings = check_settings(output="run", parallel=1, samples=1, ray_address=given)
    problems = take(settings.problems, 1)
    run_evaluation(settings, problems, server.base_url, Console(file=io.StringIO()), is_own=is_own)
    assert asked == [joined]


def test_running_it_again_runs_nothing(server: StandIn) -> None:
    run, _ = evaluate(server)
    before, asked = (run.path / "summary.json").read_text(), len(server.requests)
    again, shown = evaluate(server)
    assert "all 12 problems are already recorded: nothing to run" in shown
    assert len(server.requests) == asked
    assert (again.path / "summary.json").read_text() == before


def test_files_that_a_dead_driver_did_not_write_are_written(server: StandIn) -> None:
    run, _ = evaluate(server)
    written = run.path / "agent_states" / "arithmetic_0005.json"
    before = written.read_text()
    written.unlink()
    evaluate(server)
    assert written.read_text() == before


def test_failed_samples_are_tried_again(server: StandIn) -> None:
    poisoned = take("arithmetic", 3)[2].question
    server.fail(poisoned, Fault(400, "too long", code="context_length_exceeded"))
    run, _ = evaluate(server)
    summary = run.summary() or {}
    assert (summary["errors"], summary["samples"], summary["complete"]) == (1, 11, False)
    asked = len(server.requests)
    run, shown = evaluate(server)
    assert "continuing: 11 of 12 problems are already recorded" in shown
    assert server.questions()[asked:] == [poisoned]
    summary = run.summary() or {}
    assert (summary["errors"], summary["samples"], summary["complete"]) == (0, 12, True)
    assert summary["timing"]["samples"] == 1
    assert len(recorded_lines(run)) == 13  # the record keeps the failure too


def test_fewer_problems_than_asked_for(server: StandIn, tmp_path: Path) -> None:
    file = tmp_path / "few.jsonl"
    file.write_text(
        '{"question": "What is 1 + 1?", "answer": "#### 2"}\n{"question": "What is 5 - 8?", "answer": "#### -3"}\n'
    )
    run, shown = evaluate(server, problems=str(file), output=None)
    assert "has only 2 of the 12 problems requested: evaluating all of them" in shown
    assert "_n2_" in run.path.name
    assert (run.summary() or {})["accuracy"]["value"] == 1.0


def test_another_configuration_is_refused_before_anything_runs(server: StandIn) -> None:
    run, _ = evaluate(server)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    asked = len(server.requests)
    with pytest.raises(OtherConfigurationError, match=r"sampling\.temperature: 0\.0 in the folder, 0\.7 requested"):
        evaluate(server, temperature=0.7)
    assert len(server.requests) == asked
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_a_refused_request_stops_the_run_which_can_go_on(server: StandIn) -> None:
    server.latency = 0.05
    server.fail(take("arithmetic", 9)[8].question, Fault(400, "layer 40 is out of range"))
    with pytest.raises(
        EvalError,
        match=r"layer 40 is out of range\. Finished samples are in .*run; run the same command to continue",
    ):
        evaluate(server, parallel=1)
    run = Run("run")
    assert len(run.read_samples()) == 8
    assert run.summary() is None
    assert_complete(evaluate(server)[0])


def test_no_server_leaves_no_run(tmp_path: Path) -> None:
    with pytest.raises(FatalRequestError, match="no server answers"):
        evaluate(StandIn(base_url="http://127.0.0.1:9/v1"))
    assert list(tmp_path.iterdir()) == []


def test_a_worker_killed_mid_run_loses_nothing(server: StandIn) -> None:
    server.latency = 0.05
    server.fail(take("arithmetic", 6)[5].question, KILL)
    assert_complete(evaluate(server)[0])


def test_overload_loses_nothing(server: StandIn) -> None:
    for problem in take("arithmetic", 12):
        server.fail(problem.question, Fault(429, "busy", headers=SOON), Fault(503, "busy", headers=SOON))
    run, _ = evaluate(server, parallel=12)
    assert_complete(run)
    assert len(server.requests) == 36


def test_a_server_that_fails_at_everything_stops_the_run(server: StandIn) -> None:
    for problem in take("arithmetic", 24):
        server.fail(problem.question, Fault(400, "too long", code="context_length_exceeded"))
    with pytest.raises(
        EvalError, match=r"the last 10 problems failed, the last with: 400: too long\. Finished"
    ) as caught:
        evaluate(server, samples=24, parallel=2)
    assert len(server.requests) < 24
    assert "lower --max-tokens" in str(caught.value)
    run = Run("run")
    summary = run.summary() or {}
    assert summary["failures"][0]["count"] == summary["errors"] == summary["timing"]["samples"] >= 10
    assert "400: too long" in (run.path / "report.html").read_text()


def test_so_many_failed_samples_stop_the_run_and_no_fewer(server: StandIn) -> None:
    problems = take("arithmetic", 12)
    for place in (0, 2, 11):  # never two in a row, and the last where a run that stops after two has not come
        problem = problems[place]
        server.fail(problem.question, Fault(400, "too long", code="context_length_exceeded"))
    with pytest.raises(
        EvalError, match=r"2 samples failed \(--fail-on-error\), the last with: 400: too long\. Finished"
    ):
        evaluate(server, parallel=1, fail_on_error=2)
    assert [sample.error is None for sample in Run("run").read_samples()] == [False, True, False]
    run, _ = evaluate(server, parallel=1, fail_on_error=2)  # what failed is tried again; one more fails
    assert [s.problem_id for s in run.read_samples() if s.error] == ["arithmetic-0012"]


def test_ctrl_c_says_how_to_go_on(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    append = Recorder.append
    kept: list[Sample] = []

    def interrupt(self: Recorder, sample: Sample) -> None:
        append(self, sample)
        kept.append(sample)
        if len(kept) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "append", interrupt)
    with pytest.raises(InterruptedRunError, match="run the same command to continue") as caught:
        evaluate(server)
    assert caught.value.exit_code == 130
    monkeypatch.setattr(Recorder, "append", append)
    assert_complete(evaluate(server)[0])


@pytest.mark.parametrize(("room", "said"), [(2, "Finished samples are in"), (0, "No sample was recorded")])
def test_a_full_disk_is_one_clear_error(
    server: StandIn, monkeypatch: pytest.MonkeyPatch, room: int, said: str, tmp_path: Path
) -> None:
    append = Recorder.append
    kept: list[Sample] = []

    def full(self: Recorder, sample: Sample) -> None:
        if len(kept) == room:
            raise OSError(28, "No space left on device")
        append(self, sample)
        kept.append(sample)

    monkeypatch.setattr(Recorder, "append", full)
    with pytest.raises(EvalError, match=rf"run cannot be written: No space left on device\. {said}"):
        evaluate(server)
    assert (tmp_path / "run").exists() == (room > 0)


def test_a_run_that_fails_at_once_leaves_no_folder_and_nothing_of_others(server: StandIn, tmp_path: Path) -> None:
    def refuse(question: str) -> None:
        server.fail(question, Fault(404, "no such model"), times=50)

    for problem in take("arithmetic", 12):
        refuse(problem.question)
    with pytest.raises(EvalError, match="no such model"):
        evaluate(server)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("kept")
    with pytest.raises(EvalError, match="no such model"):
        evaluate(server)
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_layers_that_the_model_lacks_are_refused_before_anything_is_asked(server: StandIn, tmp_path: Path) -> None:
    with pytest.raises(FatalRequestError, match=r'--layers: 30 is out of range; stand-in has layers 0–29 \(or "all"\)'):
        evaluate(server, collect_activations=True, layers="-30,30")
    assert server.requests == []
    assert not (tmp_path / "run").exists()


def test_two_drivers_do_not_share_a_run(server: StandIn) -> None:
    run, _ = evaluate(server)
    with recording(run), pytest.raises(RunError, match="being written by another evaluation"):
        evaluate(server)


def test_two_at_once_in_threads_have_a_run_each(server: StandIn) -> None:
    """Both runs generate their folder's name within one second, and threads receive no signals."""
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(evaluate, server, output=None, temperature=warm) for warm in (0.0, 0.7)]
        runs = [done.result()[0] for done in both]
    assert len({run.path for run in runs}) == 2
    for run, warm in zip(runs, (0.0, 0.7), strict=True):
        assert run.config.hashed["sampling"]["temperature"] == warm
        assert_complete(run)


def test_a_signal_waits_for_the_driver_to_look_up_and_a_second_one_does_not() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with _stop_requests(None) as check_stop:
        check_stop()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            check_stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_driver_stopped_half_way_is_continued(
    server: StandIn, local_ray: str, tmp_path: Path, signal_number: int
) -> None:
    """The command itself on a given cluster; killed or interrupted, then started again."""
    server.latency = 0.15
    command = [
        sys.executable,
        "-m",
        "eval_jobs",
        "--samples",
        "24",
        "--parallel",
        "4",
        "--output",
        str(tmp_path / "run"),
    ]
    command += ["--base-url", server.base_url, "--ray-address", local_ray, "--collect-activations"]
    driver = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
        # As in a terminal: a shell that runs these tests in the background makes them ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    record = tmp_path / "run" / "samples.jsonl"
    deadline = time.monotonic() + 60
    while not (record.exists() and record.read_bytes().count(b"\n") >= 8):
        assert driver.poll() is None, driver.stderr.read() if driver.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.02)
    driver.send_signal(signal_number)
    _, said = driver.communicate(timeout=60)
    if signal_number != signal.SIGKILL:
        assert driver.returncode == 130, said
        assert "run the same command to continue" in said
        assert "Traceback" not in said
        assert "SIGTERM" not in said
    kept = list(Run(tmp_path / "run").read_samples())
    assert 8 <= len(kept) < 24

    again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    assert f"continuing: {len(kept)} of 24 problems are already recorded" in again.stderr
    run = Run(tmp_path / "run")
    assert_complete(run, 24)
    assert list(run.read_samples()[: len(kept)]) == kept
    for folder in ("samples", "trajectories", "agent_states"):
        assert len(list((run.path / folder).iterdir())) == 24
    assert len(server.requests) <= 24 + 2 * 4 + 4  # what was in flight ran twice, and no more
    assert "24/24" in again.stdout
