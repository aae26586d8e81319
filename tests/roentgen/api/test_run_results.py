"""What is made of a run, from a script."""

import asyncio
from pathlib import Path

import pandas as pd
import pytest

import roentgen
from eval_jobs import EvalError
from eval_jobs.rescoring import AT_ONCE
from roentgen.runs import RunError
from roentgen.workflows.dataset_export import ExportError
from tests.eval_jobs.test_outputs import make_run
from tests.eval_jobs.test_summary import make


def test_a_report_is_written_of_a_run_or_its_folder(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert roentgen.report(run) == run.path / "report.html"
    (run.path / "report.html").unlink()
    assert roentgen.report(str(run.path)).is_file()


def test_a_run_is_scored_again_and_compared(tmp_path: Path) -> None:
    run = make(tmp_path / "run", {(1, 1, None): "Answer: GOLD (see step 3)", (2, 1, None): "2 or GOLD"})
    assert run.accuracy.correct == 1
    other = make(tmp_path / "other", {(2, 1, None): "Answer: GOLD"})
    assert roentgen.compare(run, other.path).gained == ["arithmetic-0002"]
    again = roentgen.score(run, "flexible")
    assert list(again.samples["correct"]) == [False, True, False]
    with pytest.raises(EvalError, match=r"extractor: .flexibel. is unknown; allowed are answer, "):
        roentgen.score(run, "flexibel")


async def test_a_run_is_scored_again_in_a_running_loop(tmp_path: Path) -> None:
    """As in a notebook; a judge that waits keeps the loop that it began with."""
    loops = set()

    async def judge(output: roentgen.Output, problem: roentgen.Problem) -> bool:
        await asyncio.sleep(0)
        loops.add(asyncio.get_running_loop())
        return problem.problem_id.endswith("2")

    run = make(tmp_path / "run", {}, epochs=AT_ONCE // 2, temperature=1.0)  # so they are judged in two groups
    again = roentgen.score(run, judge)
    assert (len(again.samples), again.accuracy.correct) == (3 * AT_ONCE // 2, AT_ONCE // 2)
    assert len(loops) == 1


def test_a_sample_is_shown(tmp_path: Path) -> None:
    run = make(tmp_path / "run", {(1, 1, None): "Answer: GOLD", (1, 2, None): "none"}, epochs=2)
    shown = roentgen.show(run, 1, epoch=2)
    assert (shown.sample.epoch, shown.verdicts[shown.primary], shown.stored, shown.others) == (2, "no_answer", [], [])
    assert roentgen.show(run.path, 1).others == [shown.sample.sample_id]
    with pytest.raises(RunError, match="has no sample '9'"):
        roentgen.show(run, 9)


def test_a_run_is_exported_as_its_name_says(tmp_path: Path) -> None:
    run = make(tmp_path / "run", {(1, 1, None): "Answer: GOLD", (2, 1, None): "2"})
    done = roentgen.export(run, tmp_path / "new/samples.parquet")
    assert [(table.name, table.rows) for table in done.tables] == [("samples", 3)]
    assert list(pd.read_parquet(done.path)["correct"]) == list(run.samples["correct"])
    with pytest.raises(ExportError, match=r"output: 'x.csv' has no known extension"):
        roentgen.export(run, "x.csv")
    with pytest.raises(ExportError, match="session: allowed only with format hf; the format is eval"):
        roentgen.export(run, "x.eval", session="s")
