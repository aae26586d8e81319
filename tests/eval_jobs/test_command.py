"""The command line: a one-line message for each user error, and the right exit code."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from eval_jobs import EvalError
from eval_jobs.command import BASE_URL_VARIABLE, ServerFactory, evaluate
from eval_jobs.settings import EvalSettings
from roentgen.runs import Run
from tests.eval_jobs.stand_in import FOREVER, Fault, StandIn, running


@pytest.fixture(autouse=True)
def _work_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(BASE_URL_VARIABLE, raising=False)


def run(*arguments: str, factory: ServerFactory | None = None) -> tuple[int, str, str]:
    """Run the command in this process; return its exit code, stdout and stderr."""
    app = typer.Typer()
    app.command()(evaluate)
    result = CliRunner().invoke(app, list(arguments), obj=factory)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--samples", "0"], "error: --samples: input should be greater than or equal to 1 (given: 0)"),
        (["--ray-address", "auto"], "often the wrong one; allowed are local and HOST:PORT"),
        (["--problems", "gsm9k"], "'gsm9k' is unknown; allowed are arithmetic, gsm8k"),
        (["--problems", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
        (["--base-url", "http://127.0.0.1:9/v1"], "no server answers at http://127.0.0.1:9/v1"),
        (
            ["--base-url", "http://127.0.0.1:9/v1", "--dtype", "float32"],
            "--dtype: allowed only if this command starts the server",
        ),
        (["--store", "s", "--device", "cpu"], "--store, --device: allowed only if this command starts the server"),
    ],
)
def test_what_a_person_can_get_wrong(arguments: list[str], words: str) -> None:
    code, _, stderr = run(*arguments)
    assert code == 2
    assert words in stderr
    assert "Traceback" not in stderr


def test_a_dry_run_says_what_would_be_stored_and_stores_nothing(tmp_path: Path) -> None:
    with running(StandIn()) as server:
        arguments = [
            "--base-url",
            server.base_url,
            "--dry-run",
            "--samples",
            "4",
            "--epochs",
            "2",
            "--max-tokens",
            "91",
        ]
        code, stdout, _ = run(
            *arguments, "--collect-activations", "--layers", "all", "--hook-points", "resid_post,embed"
        )
    assert code == 0
    assert "8 samples: 4 problems × 2 epochs × 1 variants" in stdout
    # 10 + 91 - 1 rows of 31 keys of 8 float32; 13 bytes describe a row, and 7 index each of 101 tokens
    described = "and 16.1 kB to describe them"
    assert f"activations: at most 810 kB (8 samples × 31 keys × 100 rows × 32 bytes, {described})" in stdout
    assert not (tmp_path / "results").exists()


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("option", [("--layers", "3"), ("--hook-points", "resid_post"), ("--positions", "last")])
def test_who_says_what_to_keep_keeps_it(server: StandIn, option: tuple[str, str]) -> None:
    _, _, stderr = run("--base-url", server.base_url, "--output", "run", "--samples", "1", *option)
    assert f"{option[0]}: activations are stored (--collect-activations)" in stderr
    kept = Run("run").config.hashed["capture"]
    assert str(option[1]) in str(kept)
    _, _, stderr = run("--base-url", server.base_url, "--output", "plain", "--samples", "1")
    assert "activations are stored" not in stderr
    assert Run("plain").config.hashed["capture"] is None


def test_verbose_shows_the_traceback() -> None:
    code, _, stderr = run("--samples", "0", "--verbose")
    assert code == 2
    assert "Traceback" in stderr


@pytest.mark.usefixtures("local_ray")
def test_the_scores_go_to_stdout_and_the_rest_to_stderr(server: StandIn) -> None:
    code, stdout, stderr = run("--base-url", server.base_url, "--output", "run", "--samples", "2")
    assert code == 0
    assert "→ answer" in stdout
    assert "run directory" in stderr
    assert Run("run").config.settings["samples"] == 2


@pytest.mark.usefixtures("local_ray")
def test_failed_samples_are_exit_code_1(server: StandIn) -> None:
    fault = Fault(400, "too long", code="context_length_exceeded")
    server.fail("What is 4 - 1?", fault, times=FOREVER)
    code, stdout, _ = run("--base-url", server.base_url, "--output", "run")
    assert code == 1
    assert "warning: failed samples: 1" in stdout


@pytest.mark.usefixtures("local_ray")
def test_the_address_may_come_from_the_environment(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BASE_URL_VARIABLE, server.base_url)
    assert run("--output", "run", "--samples", "1")[0] == 0


@pytest.mark.usefixtures("local_ray")
def test_a_factory_s_server_is_used_and_stopped(server: StandIn) -> None:
    given: list[EvalSettings] = []
    stopped = []
    server.models = [{"id": "smollm2-135m"}]

    @contextmanager
    def factory(settings: EvalSettings) -> Iterator[str]:
        given.append(settings)
        yield server.base_url
        stopped.append(True)

    code, _, stderr = run("--output", "run", "--samples", "1", "--dtype", "float32", factory=factory)
    assert code == 0, stderr
    assert (given[0].model, given[0].dtype, stopped) == ("smollm2-135m", "float32", [True])
    assert Run("run").config.hashed["model"] == "smollm2-135m"


def test_problems_are_checked_before_a_server_is_started(tmp_path: Path) -> None:
    def factory(settings: EvalSettings) -> Iterator[str]:
        raise AssertionError("started")

    (tmp_path / "p.jsonl").write_text("{\n")
    code, _, stderr = run("--problems", "p.jsonl", factory=contextmanager(factory))
    assert code == 2
    assert "p.jsonl, line 1: not JSON" in stderr


def test_a_factory_that_cannot_start_says_why() -> None:
    @contextmanager
    def factory(settings: EvalSettings) -> Iterator[str]:
        raise EvalError("no such model")
        yield ""  # type: ignore[unreachable]

    code, _, stderr = run(factory=factory)
    assert (code, stderr.strip()) == (2, "error: no such model")


def test_a_given_address_starts_no_server(server: StandIn) -> None:
    def factory(settings: EvalSettings) -> Iterator[str]:
        raise AssertionError("started")

    code, _, stderr = run("--base-url", "http://127.0.0.1:9/v1", factory=contextmanager(factory))
    assert code == 2
    assert "no server answers" in stderr


def test_help_waits_for_nothing_heavy() -> None:
    check = "import sys, eval_jobs.command; sys.exit(bool({'ray', 'openai', 'datasets', 'torch'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
