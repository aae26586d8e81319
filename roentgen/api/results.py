"""What is made of a finished run: its page, its scores anew, its comparison with another, as the commands of these names do."""

from pathlib import Path

from eval_jobs.comparison import Comparison
from eval_jobs.comparison import compare as compare_runs
from eval_jobs.outputs import write_summary
from eval_jobs.report import write_report
from eval_jobs.rescoring import rescore
from eval_jobs.verdicts import Scorer
from roentgen.runs import Run


def report(run: Run | str | Path) -> Path:
    """Write a run's summary.json and report.html again, with probe results if there are any; return the page's path.

    Args:
        run: the run, or its folder.

    Raises:
        RunError: if there is no run, or it is damaged.
        OSError: as the disk answers.
    """
    opened = _opened(run)
    write_summary(opened, None)
    return write_report(opened)


def score(run: Run | str | Path, extractor: str | Scorer | None = None) -> Run:
    """Judge a run's answers again, without the model; what is made of them is written again too.

    Args:
        run: the run, or its folder.
        extractor: the primary one from now on: a name, a reference, or a function `(output, problem)`; the run's own if absent.

    Raises:
        EvalError: if there is no such extractor, or it returns what is no verdict; the run is as it was.
        RunError: if an evaluation is writing the run, or it is damaged.
    """
    return rescore(_opened(run), extractor)


def compare(first: Run | str | Path, second: Run | str | Path) -> Comparison:
    """Compare two runs, problem by problem: the difference of their accuracies with its interval, and McNemar's test.

    Args:
        first: a run, or its folder.
        second: another one, on some of the same problems.

    Raises:
        RunError: if there is no run, or it is damaged.
    """
    return compare_runs(_opened(first), _opened(second))


def _opened(run: Run | str | Path) -> Run:
    return run if isinstance(run, Run) else Run(run)
