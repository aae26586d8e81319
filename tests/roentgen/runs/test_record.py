"""The record as a lazy sequence in either order, and rewritten completely."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roentgen.runs import Run, RunError, Sample, create_run, recording, rewrite
from tests.roentgen.runs.test_run import config


def sample(number: int, epoch: int = 1, error: str | None = None, response: str = "") -> Sample:
    name = f"gsm8k_{number:04d}" + (f"_e{epoch}" if epoch > 1 else "")
    return Sample(
        sample_id=name, problem_id=f"p{number}", epoch=epoch, config_hash="h", question="q", solution="s", gold="1",
        error=error, response=response,
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = create_run(tmp_path / "run", config())
    with recording(made) as record:
        for one in (sample(10_000), sample(2, error="no"), sample(1, epoch=2), sample(1), sample(999), sample(2)):
            record.append(one)
    return made


def test_it_is_a_sequence(run: Run) -> None:
    samples = run.read_samples()
    assert len(samples) == 5
    assert [s.problem_id for s in samples] == ["p10000", "p2", "p1", "p1", "p999"]
    assert samples[-1] == sample(999)
    assert [s.problem_id for s in samples[1:3]] == ["p2", "p1"]
    assert samples[1].error is None
    with pytest.raises(IndexError):
        samples[5]


def test_names_are_in_the_order_of_their_numbers(run: Run) -> None:
    names = [s.sample_id for s in run.read_samples().by_name()]
    assert names == ["gsm8k_0001", "gsm8k_0001_e2", "gsm8k_0002", "gsm8k_0999", "gsm8k_10000"]


def test_variants_are_in_the_order_in_which_they_were_declared(tmp_path: Path) -> None:
    variants = {name: {"prefix": "", "config_hash": f"hash-{name}"} for name in ("v10", "v9", "a")}
    run = create_run(tmp_path / "run", config().model_copy(update={"variants": variants}))
    attempts = [(number, epoch, name) for number in (2, 10) for epoch in (1, 2, 11) for name in variants]
    with recording(run) as record:
        for number, epoch, name in reversed(attempts):
            suffix = f"_e{epoch}" if epoch > 1 else ""
            changes = {
                "sample_id": f"gsm8k_{number:04d}{suffix}_v-{name}", "variant": name, "config_hash": f"hash-{name}"
            }  # fmt: skip
            record.append(sample(number, epoch).model_copy(update=changes))
    found = [(int(s.problem_id[1:]), s.epoch, s.variant) for s in run.read_samples().by_name()]
    assert found == attempts


def test_a_rewritten_record_keeps_one_line_per_sample(run: Run) -> None:
    again = rewrite(run, lambda s: s.model_copy(update={"correct": True}), run.config)
    assert again.record_path.read_bytes().count(b"\n") == 5
    assert all(s.correct for s in again.read_samples())
    assert not list(run.path.glob(".*.tmp"))


def test_a_record_that_is_being_written_is_not_rewritten(run: Run) -> None:
    before = run.record_path.read_bytes()
    with recording(run):
        assert run.is_running
        with pytest.raises(RunError, match="is being written"):
            rewrite(run, lambda s: s, run.config)
    assert not run.is_running
    assert run.record_path.read_bytes() == before  # type: ignore[unreachable]


def test_a_change_that_fails_leaves_the_record(run: Run) -> None:
    before = run.record_path.read_bytes()
    with pytest.raises(ZeroDivisionError):
        rewrite(run, lambda s: s.model_copy(update={"seconds": 1 / (s.epoch - 2)}), run.config)
    assert run.record_path.read_bytes() == before
    assert not list(run.path.glob(".*.tmp"))


@given(
    st.lists(st.tuples(st.integers(1, 4), st.booleans(), st.text(max_size=5)), max_size=12),
    st.integers(0, 300),
)
def test_any_crash_leaves_a_readable_record(
    tmp_path_factory: pytest.TempPathFactory, written: list[tuple[int, bool, str]], torn: int
) -> None:
    """Whatever was appended, and wherever the last line was torn: each problem's first answer, else its last error."""
    run = create_run(tmp_path_factory.mktemp("runs") / "run", config())
    expected: dict[int, Sample] = {}
    with recording(run) as record:
        for number, failed, text in written:
            one = sample(number, error="no" if failed else None, response=text)
            record.append(one)
            if number not in expected or expected[number].error is not None:
                expected[number] = one
    whole = run.record_path.stat().st_size
    with open(run.record_path, "ab") as file:
        file.write((sample(9).model_dump_json().encode() + b"\n")[:torn].rstrip(b"\n"))
    assert {s.sample_id: s.response for s in run.read_samples()} == {s.sample_id: s.response for s in expected.values()}
    with recording(run):
        pass
    assert os.path.getsize(run.record_path) == whole
