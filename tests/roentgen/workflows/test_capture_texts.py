"""`roentgen capture` of a run finds the run's own model again, wherever the run's folder is."""

from pathlib import Path

import pytest
from rich.console import Console

from roentgen.runs import Run, RunConfig, Sample, create_run, recording
from roentgen.store import Session
from roentgen.workflows.capture_texts import CaptureError, capture
from roentgen.workflows.command_settings import CaptureSettings
from serve_app.models.model_source import locate
from tests.serve_app import tiny


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run of a model in a folder, as an evaluation records it."""
    folder = tmp_path / "models" / "mine"
    tiny.module("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    source = locate("models/mine/")
    served = {"id": source.name, "revision": source.revision, "dtype": "float32", "root": source.root}
    run = create_run(tmp_path / "run", RunConfig(
        run_id="run", created="2025-01-01T00:00:00Z", config_hash="c0ffee", problems={}, prompt={}, versions={},
        hashed={"model": source.name, "revision": source.revision, "dtype": "float32"},
        settings={"model": "models/mine/", "served": served},
    ))  # fmt: skip
    with recording(run) as record:
        record.append(Sample(
            sample_id="s_0001", problem_id="p1", config_hash="c0ffee", question="?", solution="!", gold="2",
            messages=[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
        ))  # fmt: skip
    return run


def settings(run: Run, **options: object) -> CaptureSettings:
    store = run.path.parent / "store"
    return CaptureSettings(
        source=run.path, store=str(store), layers=(0,), hook_points=("resid_post",), device="cpu", **options
    )


@pytest.mark.parametrize("model", [None, "mine", "models/mine"])
def test_a_run_s_model_is_found_from_another_folder(
    run: Run, monkeypatch: pytest.MonkeyPatch, model: str | None
) -> None:
    if model != "models/mine":
        monkeypatch.chdir("/")
    said: list[str] = []
    report = capture(settings(run, model=model), Console(quiet=True), said.append)
    assert (report.stored, report.failures) == (1, [])
    assert Session.open(report.session).rollouts()["config_hash"].tolist() == ["c0ffee"]
    assert not any("the run's model was" in line for line in said)


def test_a_run_s_model_that_has_gone_is_named_by_its_folder(run: Run) -> None:
    (run.path.parent / "models" / "mine").rename(run.path.parent / "moved")
    with pytest.raises(CaptureError, match=r"/models/mine.*no such folder"):
        capture(settings(run), Console(quiet=True), print)
    assert capture(settings(run, model="moved"), Console(quiet=True), print).stored == 1
