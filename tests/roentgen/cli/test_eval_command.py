"""What of `roentgen eval --launch` goes to the cluster, and what is found out before one is paid for."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from roentgen.cli import app
from roentgen.cloud.evaluate import Afterwards
from roentgen.cloud.task import ClusterSettings


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What was handed to the launcher, call by call; the launcher itself is tested in tests/roentgen/cloud."""
    calls: list[dict[str, Any]] = []

    def launch(settings: ClusterSettings, options: list[str], afterwards: Afterwards, *rest: Any) -> Path:
        calls.append({"settings": settings, "options": options, "afterwards": afterwards, "files": rest[-1]})
        return tmp_path / "run"

    monkeypatch.setattr("roentgen.cloud.evaluate.launch_and_evaluate", launch)
    monkeypatch.setenv("ROENTGEN_SKY", "/bin/true")
    return calls


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["eval", "--launch", *words])


def test_what_is_given_travels_and_what_is_the_server_s_stays(launched: list[dict[str, Any]]) -> None:
    words = (
        "--samples",
        "7",
        "--mode",
        "with-tools",
        "--model",
        "some/model",
        "--dtype",
        "float16",
        "--revision",
        "abc",
    )
    done = run(*words, "--engine", "vllm", "--gpu-id", "gpu-1", "--remote-storage-only", "--verbose")
    assert done.exit_code == 0, done.output
    (call,) = launched
    assert call["options"] == ["--samples", "7", "--mode", "with-tools", "--verbose"]
    settings = call["settings"]
    assert (settings.model, settings.dtype, settings.revision) == ("some/model", "float16", "abc")
    assert (settings.engine, settings.cluster, settings.min_vram, settings.max_price) == ("vllm", "gpu-1", 16, 0.60)
    assert call["afterwards"].transfer_activations is False


def test_the_server_taps_what_the_run_reads(launched: list[dict[str, Any]]) -> None:
    assert run("--hook-points", "resid_post,resid_mid,mlp.output").exit_code == 0
    assert run("--collect-activations").exit_code == 0
    assert [call["settings"].taps for call in launched] == ["default,resid_mid,mlp.output", ""]


def test_files_of_this_machine_go_along(launched: list[dict[str, Any]], tmp_path: Path) -> None:
    problems, variants = tmp_path / "my problems.jsonl", tmp_path / "moods.yaml"
    problems.write_text('{"question": "2 + 2?", "answer": "#### 4"}\n')
    variants.write_text("plain: ''\ncalm: Take your time.\n")
    done = run("--problems", str(problems), "--variants", str(variants), "--samples", "1")
    assert done.exit_code == 0, done.output
    (call,) = launched
    assert call["options"] == ["--samples", "1"]
    assert call["files"] == {"--problems": problems, "--variants": variants}


def test_columns_are_those_of_the_file(launched: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("q,a\n1 + 1?,2\n")
    words = ("--problems", str(tmp_path / "p.csv"), "--columns")
    assert run(*words, "question=q,answer=a").exit_code == 0
    wrong = run(*words, "question=q,answer=gold")
    assert wrong.exit_code == 2
    assert "no column 'gold'; it has q, a" in " ".join(wrong.output.split())
    assert len(launched) == 1


def test_what_is_in_a_folder_of_this_machine_only_is_refused(launched: list[dict[str, Any]], tmp_path: Path) -> None:
    done = run("--problems", f"hf:{tmp_path}?split=test")
    assert done.exit_code == 2
    assert "is a folder on this machine, which the cluster does not have" in " ".join(done.output.split())
    assert launched == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--layers", "8,x"), "--layers"),
        (("--problems", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--shots-source", "nowhere.py:shots", "--fixed-shots", "1"), "there is no file"),
        (("--prompt-file", "nowhere.txt"), "nowhere.txt"),
        (("--variants", "nowhere.yaml"), "nowhere.yaml"),
        (("--dtype", "int4"), "--dtype"),
        (("--engine", "sglang"), "--engine"),
        (("--device", "cuda"), "--device: not allowed with --launch"),
        (("--base-url", "http://127.0.0.1:1/v1"), "--base-url: not allowed with --launch"),
        (("--transfer-activations", "--remote-storage-only"), "mutually exclusive"),
    ],
)
def test_what_is_wrong_is_found_before_anything_is_paid_for(
    launched: list[dict[str, Any]], words: tuple[str, ...], said: str
) -> None:
    done = run(*words)
    assert done.exit_code == 2
    assert said in done.output
    assert launched == []
