"""The store's benchmark writes, reads and reports; how fast that is, is for the benchmark to say."""

from pathlib import Path

from benchmarks.many_rollouts import Opened, StoreStep
from benchmarks.store import measure_bandwidth, report_bandwidth, report_sessions
from roentgen.store import Session, verify
from roentgen.store.storage_backends import open_folder


def test_bandwidth_is_measured_in_turns_and_laid_out(tmp_path: Path) -> None:
    rates = measure_bandwidth(open_folder(tmp_path / "b"), 13, 2, lambda _: None)
    assert [len(one.raw) for one in rates] == [len(one.store) for one in rates] == [2, 2, 2]
    assert all(rate > 0 for one in rates for rate in (*one.raw, *one.store))
    assert (verify(Session.open(tmp_path / "b/s")).rollouts, verify(Session.open(tmp_path / "b/s")).ok) == (2, True)
    lines = report_bandwidth([("disk", 13, rates)], 2).splitlines()
    assert [line.split(" | ")[0] for line in lines[-3:]] == [
        "| disk, 13 MB: write",
        "| disk, 13 MB: read",
        "| disk, 13 MB: read one layer of 12",
    ]
    assert report_bandwidth([], 2) == ""


def test_large_sessions_are_laid_out() -> None:
    step = StoreStep(1.5, 90_000_000)
    line = report_sessions([("disk", Opened(1_000_000, 12, 80_000_000, step, step, step, step))]).splitlines()[-1]
    assert "| 1,000,000 | 12, 80 MB | 1.5 s, 90 MB |" in line
    assert "90 B each" in line
