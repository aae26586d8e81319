"""What is made of a run, from a script."""

from pathlib import Path

import pytest

import roentgen
from eval_jobs import EvalError
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
