"""The run record: durable, truncated after a torn line, and with one writer at a time."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roentgen.atomic_files import write_json
from roentgen.runs import (
    Run,
    RunConfig,
    RunError,
    Sample,
    create_named_run,
    create_run,
    find_unfinished,
    recording,
    rewrite,
)
from tests.disk import DiskCalls


def config(config_hash: str = "h", created: str = "2026-01-01T00:00:00Z") -> RunConfig:
    return RunConfig(
        run_id="r",
        created=created,
        config_hash=config_hash,
        hashed={},
        problems={"n": 2},
        settings={},
        prompt={},
        versions={},
    )


def sample(problem: str, *, error: str | None = None, response: str = "") -> Sample:
    return Sample(
        sample_id="gsm8k_0001", problem_id=problem, config_hash="h", question="q", solution="s", gold="1", error=error,
        response=response,
    )  # fmt: skip


def test_appended_samples_are_read_back(tmp_path: Path) -> None:
    run = create_run(tmp_path / "run", config())
    with recording(run) as record:
        record.append(sample("a"))
        record.append(sample("b", response="é\n"))
    assert [s.problem_id for s in Run(tmp_path / "run").read_samples()] == ["a", "b"]
    assert Run(tmp_path / "run").read_samples()[1].response == "é\n"


def test_an_answer_counts_before_an_error_and_the_first_before_later_ones(tmp_path: Path) -> None:
    run = create_run(tmp_path, config())
    with recording(run) as record:
        for s in [
            sample("a", error="timeout"),
            sample("a", response="1"),
            sample("a", response="2"),
            sample("a", error="x"),
        ]:
            record.append(s)
    assert [(s.error, s.response) for s in run.read_samples()] == [(None, "1")]


@settings(max_examples=30, deadline=None)
@given(st.integers(min_value=1, max_value=400))
def test_a_torn_line_is_skipped_and_then_cut(tmp_path_factory: pytest.TempPathFactory, torn: int) -> None:
    run = create_run(tmp_path_factory.mktemp("run"), config())
    with recording(run) as record:
        record.append(sample("a"))
        record.append(sample("b"))
    whole = run.record_path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    run.record_path.write_bytes(whole[: len(whole) - min(torn, last)])
    assert [s.problem_id for s in run.read_samples()] == ["a"]
    with recording(run) as record:
        record.append(sample("c"))
    assert [s.problem_id for s in run.read_samples()] == ["a", "c"]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    run = create_run(tmp_path, config())
    with recording(run) as record:
        record.append(sample("a"))
        record.append(sample("b"))
    lines = run.record_path.read_text().splitlines(keepends=True)
    run.record_path.write_text("{not json\n" + lines[1])
    with pytest.raises(RunError, match=r"samples\.jsonl, line 1"):
        run.read_samples()


def test_two_drivers_cannot_write_one_run(tmp_path: Path) -> None:
    run = create_run(tmp_path, config())
    with recording(run), pytest.raises(RunError, match="another evaluation"), recording(Run(tmp_path)):
        pass


def test_what_is_no_run_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no config\.json"):
        Run(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RunError, match="damaged"):
        Run(tmp_path)
    with pytest.raises(RunError, match="already holds a run"):
        create_run(tmp_path, config())
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="not writable"):
        create_run(tmp_path / "file" / "run", config())


def test_the_newest_unfinished_run_of_a_configuration_is_found(tmp_path: Path) -> None:
    for name, made in [("old", "2026-01-01"), ("new", "2026-01-03"), ("done", "2026-01-04")]:
        create_run(tmp_path / name, config(created=made))
    create_run(tmp_path / "other", config("other", created="2026-01-05"))
    write_json(tmp_path / "done" / "summary.json", {"complete": True})
    (tmp_path / "a-model").mkdir()
    (tmp_path / "a-model" / "config.json").write_text('{"model_type": "llama"}')
    found = find_unfinished(tmp_path, "h", {"n": 2})
    assert found is not None
    assert found.path.name == "new"
    assert find_unfinished(tmp_path, "h", {"n": 3}) is None


def test_a_summary_that_is_torn_is_said_to_be(tmp_path: Path) -> None:
    run = create_run(tmp_path / "run", config())
    (run.path / "summary.json").write_text('{"complete": tr')
    with pytest.raises(RunError, match=r"summary\.json is damaged .*; `roentgen report .*run` writes it again"):
        run.summary()


def test_a_made_up_name_that_is_taken_gets_a_number(tmp_path: Path) -> None:
    runs = [create_named_run(tmp_path / "results" / "sums", config()) for _ in range(3)]
    assert [run.path.name for run in runs] == ["sums", "sums_2", "sums_3"]
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="not writable"):
        create_named_run(tmp_path / "file" / "run", config())


def test_a_run_is_written_and_rewritten_durably(tmp_path: Path, disk_calls: DiskCalls) -> None:
    run = create_run(tmp_path / "new" / "run", config())
    assert ("fsync", str(tmp_path / "new")) in disk_calls.calls  # the run's folder, in its parent
    disk_calls.check_atomic(run.path / "config.json")
    disk_calls.calls.clear()
    with recording(run) as record:
        record.append(sample("a"))
    assert disk_calls.calls == [("fsync", str(run.path)), ("fsync", str(run.record_path))]
    disk_calls.calls.clear()
    run = rewrite(run, lambda one: one.model_copy(update={"response": "again"}), config("other"))
    assert [one.response for one in run.read_samples()] == ["again"]
    disk_calls.check_atomic(run.record_path)
    disk_calls.check_atomic(run.path / "config.json")


def test_a_disk_that_fails_during_a_rewrite_leaves_the_run_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = create_run(tmp_path, config())
    with recording(run) as record:
        record.append(sample("a"))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        rewrite(run, lambda one: one.model_copy(update={"response": "again"}), config("other"))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
