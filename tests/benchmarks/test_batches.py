"""The benchmark of shuffled batches reads every row in each way; how fast that is, is for the benchmark to say."""

from pathlib import Path

from benchmarks.batches import measure, report


def test_batches_are_measured_in_turns_and_laid_out(tmp_path: Path) -> None:
    found = measure(tmp_path, 3, 128, 2, lambda _: None)
    assert {name: len(rates) for name, rates in found.rates.items()} == {
        "in order": 2,
        "shuffled": 2,
        "batches in order": 2,
    }
    assert all(rate > 0 for rates in found.rates.values() for rate in rates)
    assert 1 <= found.mixed <= found.rollouts
    lines = report(found, 3, 128).splitlines()
    assert [line.split(" | ")[0] for line in lines[-3:]] == ["| in order", "| shuffled", "| batches in order"]
