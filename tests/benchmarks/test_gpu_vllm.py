"""The GPU benchmark's part for vLLM, on vLLM's CPU build: a tiny model takes the same way. A stale buffer has to be found."""

import importlib.util
import json
import time
from pathlib import Path

import pytest

from benchmarks.fast_engine import (
    BUDGETS,
    FEW,
    MANY,
    NONE,
    PLAIN,
    TAPS_AT,
    EngineRound,
    EngineTimes,
    read_rounds,
    report,
)
from benchmarks.gpu import TINY, Bench, Size
from benchmarks.gpu_report import PARTS, SECTION, GpuReport
from benchmarks.gpu_rows import checked_keys
from benchmarks.worker_times import READING, STORING, WRITER
from benchmarks.workload import Workload

INSTALLED = importlib.util.find_spec("vllm") is not None
pytestmark = pytest.mark.skipif(not INSTALLED, reason="vLLM is not installed; make test-vllm runs this")


@pytest.mark.rotating
@pytest.mark.integration
def test_rows_are_judged_a_stale_buffer_is_found_and_speeds_are_compared(tmp_path: Path) -> None:
    now = time.monotonic()
    size = Size(TINY.models, (3,), 4, 1)
    Bench(GpuReport(tmp_path, None), size, "float32", "cpu", now, now + 1000).vllm("llama-tiny")
    parts = {(part["part"], part["of"]): part for part in map(json.loads, (tmp_path / PARTS).read_text().splitlines())}
    assert parts.keys() == {("vllm rows", "llama-tiny"), ("vllm speed", "llama-tiny, 3 in flight")}
    rows = parts["vllm rows", "llama-tiny"]
    assert rows["status"] == "ok", rows["reason"]
    found = rows["result"]
    assert found["control"] == ["layers.2.resid_post"]
    assert {key["key"] for key in found["keys"]} == set(checked_keys(4))
    assert all(key["engine"] < 1e-4 and key["cosine"] > 0.9999 for key in found["keys"])
    arms = parts["vllm speed", "llama-tiny, 3 in flight"]["result"]["arms"]
    assert [arm["arm"] for arm in arms] == ["plain", "none", "3x2", "all", "probes"]
    assert all(len(arm["rates"]) == 1 and arm["rates"][0] > 0 and arm["between_s"] > 0 for arm in arms)
    section = (tmp_path / SECTION).read_text()
    assert "| vllm | llama-tiny | float32 |" in section
    assert "| llama-tiny | 3 | probes |" in section


def test_ratios_are_of_runs_of_the_same_round(tmp_path: Path) -> None:
    """The second round is half as fast as the first in everything, and no ratio shows it."""
    shares = {READING: 0.01, STORING: 0.002, WRITER: 0.03}
    rates = {PLAIN: 100.0, NONE: 99.0, "3x2": 98.0, "all": 95.0, "probes": 98.5, FEW: 99.5, MANY: 90.0}
    assert set(BUDGETS) < set(rates)
    taps = {FEW: (30, 10**6), NONE: (90, 3 * 10**6), MANY: (210, 7 * 10**6)}
    rounds = [
        EngineRound(TAPS_AT, 0, {name: EngineTimes(rate / k, 0.01 * k, shares) for name, rate in rates.items()}, taps)
        for k in (1, 2)
    ]
    text = report(Workload(), rounds, 2)
    assert "| 16 | every layer's residual on disk | 0.93× | 0.950 (0.950 to 0.950) | 2 | 1 |" in text
    assert "| 210 | 7 MB | 0.900 (0.900 to 0.900) | 2 | 1 |" in text
    assert "| 16 | 3 layers × 2 hook points on disk | 1.0% | 0.2% | 3.0% |" in text
    assert read_rounds(tmp_path / "none") == []
