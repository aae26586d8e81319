"""The GPU benchmark on a CPU: a tiny model takes the same way. What it says of a GPU only a GPU can show."""

import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from packaging.requirements import Requirement
from typer.testing import CliRunner

from benchmarks.gpu import TINY, Bench, Size, main
from benchmarks.gpu_report import PARTS, SECTION, GpuReport
from benchmarks.gpu_rows import IN_LAYER, check_rows, checked_keys, in_float32, read_alone
from benchmarks.gpu_speed import DidNotFitError, fitting, measure_group
from benchmarks.ways import OutOfTimeError, engine_way
from benchmarks.workload import Workload
from serve_app.capture.batch_layout import PaddedBatch
from serve_app.capture.rows import StepRows
from serve_app.engines.transformers.engine import TransformersEngine
from serve_app.engines.transformers.kv_cache import SlotRows
from serve_app.engines.transformers.load_checks import CheckedModel
from tests.serve_app import tiny

ROOT = Path(__file__).parents[2]
ROWS_ONLY = Size(TINY.models, (), 1, 1)


def workload(dtype: str = "float32") -> Workload:
    return Workload(random_weights="llama-tiny", dtype=dtype, device="cpu")


def soon(seconds: float = 300) -> float:
    return time.monotonic() + seconds


def only(packages: list[str], folder: Path) -> list[str]:
    """Link these packages, and what they require, into a folder; returns the names of all of them."""
    todo, names = list(packages), set()
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in names:
            continue
        try:
            found = distribution(name)
        except PackageNotFoundError:  # a dependency of another platform's build
            continue
        names.add(name)
        required = map(Requirement, found.requires or [])
        todo += [one.name for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
        for top in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(found.locate_file(top))))
    return sorted(names)


def test_it_needs_no_more_than_make_installs_for_it(tmp_path: Path) -> None:
    """The engine imports, generates and captures, and the benchmark runs, where there is no Ray, FastAPI, OpenAI or pyarrow."""
    listed = re.search(r"^GPU_PACKAGES := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert listed is not None
    site, out = tmp_path / "site", tmp_path / "out"
    site.mkdir()
    names = only(listed[1].split(), site)
    assert {"torch", "transformers", "nnsight"} < set(names)
    assert not {"ray", "fastapi", "openai", "pyarrow", "datasets", "llguidance", "scikit-learn"} & set(names)
    environment = {key: value for key, value in os.environ.items() if key != "OUT"}
    done = subprocess.run(
        # -S: the packages that are installed beside this test are not to be found.
        [sys.executable, "-S", "-m", "benchmarks.gpu", "--tiny", "--device", "cpu"],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(site), "OUT": str(out)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    parts = {(part["part"], part["of"]): part for part in map(json.loads, (out / PARTS).read_text().splitlines())}
    assert "ray" not in parts["environment", ""]["result"]["packages"]
    rows = parts["rows", "llama-tiny"]
    assert rows["status"] == "ok"
    assert rows["result"]["requests"] == 15  # of 16, one is canceled
    assert {key["key"] for key in rows["result"]["keys"]} == set(checked_keys(4))
    assert all(key["engine"] < 1e-5 for key in rows["result"]["keys"])
    assert parts["vllm", "llama-tiny"]["status"] == "not run"
    assert parts["copies", ""]["status"] == "not run"
    for in_flight in TINY.in_flight:
        arms = parts["speed", f"llama-tiny, {in_flight} in flight"]["result"]["arms"]
        assert [arm["capture"] for arm in arms] == ["none", "3x2", "all"]
        assert all(arm["rate"] > 0 and arm["tokens"] for arm in arms)
        assert [bool(arm["captured_bytes"]) for arm in arms] == [False, True, True]
    section = (out / SECTION).read_text()
    assert section.startswith("## GPU\n")
    assert re.search(r"\| llama-tiny \| 8 \| \d\.\d \| all \| \d", section)
    assert section in done.stdout
    assert "- copies: not run, there is no GPU to copy from" in section
    assert "- vllm llama-tiny: not run, vllm is not installed here; constraints-vllm-cuda.txt has vLLM" in section


def one_to_the_left(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PaddedBatch.flat_indices

    def wrong(self: PaddedBatch, row: int, positions: range) -> range:
        indices = right(self, row, positions)
        return range(max(indices.start - 1, 0), max(indices.stop - 1, 0), indices.step) if len(indices) > 1 else indices

    monkeypatch.setattr(PaddedBatch, "flat_indices", wrong)


def no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    right = SlotRows.step_inputs

    def wrong(self: SlotRows) -> Any:
        mask, positions = right(self)
        return torch.ones_like(mask), positions

    monkeypatch.setattr(SlotRows, "step_inputs", wrong)


def mixed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    right = SlotRows.keep
    monkeypatch.setattr(SlotRows, "keep", lambda self, rows: sorted(right(self, rows)))


ROWS = r"request \d+, layers\.\d\.resid_post: \d+ of \d+ rows are wrong, at positions \d"
COUNT = r"request \d+ has rows of positions \d"


@pytest.mark.parametrize(
    ("fault", "dtype", "named"),
    [(one_to_the_left, "bfloat16", ROWS), (no_mask, "bfloat16", ROWS), (mixed_up, "float32", COUNT)],
    ids=["one_to_the_left", "no_mask", "mixed_up"],
)
def test_wrong_rows_are_found_and_named(
    fault: Any,
    dtype: str,
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The check at loading finds some of these too, and would keep requests apart.
    monkeypatch.setattr("benchmarks.workload.check_loaded", lambda *_: CheckedModel())
    fault(monkeypatch)
    monkeypatch.setattr("benchmarks.gpu.VLLM_PACKAGES", ("no_such_package",))
    bench = Bench(GpuReport(tmp_path, None), ROWS_ONLY, dtype, "cpu", time.monotonic(), soon())
    assert bench.run() == 1
    said = capsys.readouterr().err
    assert "rows llama-tiny: WRONG" in said
    assert re.search(named, said)
    part = json.loads((tmp_path / PARTS).read_text().splitlines()[1])
    assert part["status"] == "wrong"
    assert all(wrong["error"] > wrong["allowed"] for wrong in part["result"]["wrong"])
    assert "**wrong**" in (tmp_path / SECTION).read_text()


def test_in_bfloat16_rounding_is_not_taken_for_wrong() -> None:
    found = check_rows(workload("bfloat16"), soon())
    assert found.problems == []
    assert all(0 < key.plain < key.allowed for key in found.keys if key.key != "embed")
    assert all(key.neighbor > key.allowed for key in found.keys if key.neighbor is not None)


def test_the_judge_is_a_float32_forward_of_the_same_weights() -> None:
    module, _ = workload("bfloat16").load_plain()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    fed, keys, cpu = list(range(3, 40)), checked_keys(4), torch.device("cpu")
    with in_float32(module):
        rows, logits = read_alone(module, fed, keys, cpu)
    assert all(value.dtype == before[name].dtype for name, value in module.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    expected, expected_logits = read_alone(module.float(), fed, keys, cpu)
    assert all(rows[key].dtype == torch.float32 and torch.equal(rows[key], expected[key]) for key in keys)
    assert torch.equal(logits, expected_logits)
    assert len({tuple(rows[f"layers.2.{name}"].flatten().tolist()) for name in IN_LAYER}) == len(IN_LAYER)


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--dtype", "int8", "bfloat16"),
        ("--device", "gpu", "cuda"),
        ("--models", "qwen3-0.6b", "llama-8b"),
        ("--in-flight", "8,0", "above 0"),
    ],
)
def test_an_option_that_cannot_be_is_refused_at_once(option: str, value: str, named: str, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, [option, value, "--out", str(tmp_path / "none")])
    assert result.exit_code == 2
    said = " ".join(result.output.replace("│", " ").split())
    assert option in said
    assert f"'{value}'" in said
    assert named in said
    assert not (tmp_path / "none").exists()


def test_what_the_time_does_not_allow_is_named(tmp_path: Path) -> None:
    report = GpuReport(tmp_path, tmp_path / "RESULTS.md")
    assert Bench(report, TINY, "auto", "cpu", time.monotonic(), time.monotonic()).run() == 1  # no row was checked
    assert {part.status for part in report.parts} == {"not run"}
    text = (tmp_path / "RESULTS.md").read_text()
    assert "- rows llama-tiny: not run, the time was over" in text
    assert "- speed llama-tiny, 8 in flight: not run, the time was over" in text
    with pytest.raises(OutOfTimeError):
        check_rows(workload(), soon(0.1))


def test_a_run_without_time_leaves_the_engine_to_the_next() -> None:
    model = tiny.loaded()
    engine = TransformersEngine(model)
    prompts = [[5, 6, 7], [8, 9]]
    with pytest.raises(OutOfTimeError):
        engine_way(engine, model, "all", deadline=soon(0))(prompts, 200, 2)
    assert engine_way(engine, model, "all", deadline=soon())(prompts, 4, 2).tokens == 8
    engine.close()
    assert sum(engine.load.steps.values()) < 100  # the run of 200 tokens was canceled


def test_what_does_not_fit_is_said_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    right = StepRows.deliver

    def deliver(self: StepRows) -> None:
        if any(key.endswith("resid_post") for key in self.taps):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore words")
        right(self)

    monkeypatch.setattr(StepRows, "deliver", deliver)
    group = measure_group(
        workload().load(), 2, max_tokens=3, rounds=2, more_until=soon(), deadline=soon(), stage=lambda _: None
    )
    arms = {arm.capture: arm for arm in group.arms}
    assert arms["all"].skipped == "did not fit: CUDA out of memory. Tried to allocate 2 GiB."
    assert len(arms["none"].rates) == len(arms["3x2"].rates) == 2
    assert arms["3x2"].ratio is not None
    with pytest.raises(DidNotFitError, match="MemoryError"), fitting():
        raise MemoryError
