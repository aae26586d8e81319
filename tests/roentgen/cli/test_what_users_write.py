"""What a person can write wrongly ends as one line and exit code 2, whatever the command: never as a traceback."""

import os
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from roentgen.cli import app
from tests.conftest import ROENTGEN


def run(*arguments: str) -> tuple[int, str]:
    """Run the command in this process; return its exit code and all that it says, in one line."""
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, list(arguments))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, " ".join(f"{done.stdout} {done.stderr}".split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "--port", "99999"], "--port 99999: not a valid port; allowed are 1 to 65535"),
        (
            ["serve", "--allow-model", "nope", "--tensor-parallel-size", "2"],
            "tensor_parallel_size: only the vLLM engine supports it; set engine=vllm",
        ),
        (["serve", "--device-map", "{"], "error: --device-map: "),
        (["serve", "--probes", "nowhere"], "nowhere is not a folder"),
        (["serve", "--model", "./nowhere"], "there is no such folder"),
        (["serve", "--host", "not a host"], "--host"),
        (["serve", "--store", "/proc/nowhere"], "/proc/nowhere"),
        (["serve", "--ray-address", "auto"], "often the wrong one"),
        (["eval", "--model", "./nowhere"], "there is no such folder"),
        (["eval", "--hook-points", "resid_pots"], "did you mean 'resid_post'?"),
        (["eval", "--base-url", "nonsense"], "is not the address of a server"),
        (["eval", "--scorer", "nobody"], "--extractor: 'nobody' is unknown; allowed are answer"),
        (["eval", "--base-url", "http://127.0.0.1:99999/v1"], "127.0.0.1:99999"),
        (["capture", "nowhere"], "nowhere is neither a run directory nor a file"),
        (["verify-capture", "./nowhere"], "there is no such folder"),
        (
            ["verify-capture", "smollm2-135m", "--layers", "99"],
            "--layers: 99 is out of range; smollm2-135m has layers 0–29",
        ),
        (["inspect", "./nowhere"], "there is no such folder"),
        (["smoke", "127.0.0.1:99999"], "is not the address of a server"),
        (["smoke", "127.0.0.1:9"], "no connection to 127.0.0.1:9"),
        (["doctor", "--port", "99999"], "Invalid value for"),
        (["doctor", "http://127.0.0.1:99999"], "is not the address of a server"),
        (["probe", "train", "nowhere"], "nowhere"),
        (["probe", "steer", "nowhere"], "nowhere is neither a run nor a saved probe"),
        (["report", "nowhere"], "is not a run directory"),
        (["sessions", "show", "nowhere"], "nowhere"),
        (["sessions", "list", "/proc/1/nowhere"], "nowhere"),
        (["export", "nowhere", "x.csv"], "has no known extension"),
        (["export", "nowhere", "x", "--format", "hf"], "is not a run directory"),
        (["show", "nowhere", "7"], "is not a run directory"),
    ],
)
def test_one_line_and_no_traceback(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def unexpected(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("ray.init", unexpected)
    code, shown = run(*arguments)
    assert said in shown
    assert code == 2 or (code == 0 and arguments[:2] == ["sessions", "list"])


def test_a_cluster_that_ssh_does_not_know_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "ssh").write_text("#!/bin/sh\nexit 255\n")
    (tmp_path / "ssh").chmod(0o755)
    environment = {**os.environ, "PATH": str(tmp_path)}
    command = [ROENTGEN, "doctor", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, "ssh cannot reach a machine 'nowhere'" in done.stderr) == (2, True), done.stderr
    (tmp_path / "ssh").unlink()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, "ssh is not installed" in done.stderr, "Traceback" in done.stderr) == (2, True, False)
