"""What is made of a finished run: `roentgen report`."""

from pathlib import Path
from typing import Annotated

import typer

from roentgen.cli.console import expected_errors, out


def report(run: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Write a run's report.html again (with probe results, if there are any) and print its path."""
    from eval_jobs.report import write_report
    from roentgen.runs import Run, RunError

    with expected_errors(RunError):
        out.print(str(write_report(Run.open(run))), highlight=False, soft_wrap=True)
