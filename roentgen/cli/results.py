"""What is made of a run: `roentgen report`, `score`, `export`, `status` and `compare`."""

from pathlib import Path
from typing import Annotated

import typer

from roentgen.cli.console import expected_errors, out

RunPath = Annotated[Path, typer.Argument(help="A run directory.")]


def report(run: RunPath) -> None:
    """Write a run's summary.json and report.html again (with probe results, if there are any) and print the page's path."""
    from roentgen.api.run import Run
    from roentgen.runs import RunError

    with expected_errors(RunError, OSError):
        out.print(str(Run(run).report()), highlight=False, soft_wrap=True)


def score(
    run: RunPath, extractor: Annotated[str | None, typer.Option(help="The primary one from now on.")] = None
) -> None:
    """Judge a run's answers again, without the model, and print its scores."""
    from eval_jobs.console import print_summary
    from eval_jobs.rescoring import rescore
    from eval_jobs.scoring import EXTRACTORS
    from roentgen.runs import Run, RunError

    if extractor is not None and extractor not in EXTRACTORS:
        raise typer.BadParameter(
            f"{extractor!r} is unknown; allowed are {', '.join(EXTRACTORS)}", param_hint="--extractor"
        )
    with expected_errors(RunError):
        again = rescore(Run.open(run), extractor)
        print_summary(again, again.summary() or {}, out)


def export(
    run: RunPath, output: Annotated[Path, typer.Argument(help="SAMPLES.parquet, or LOG.eval for inspect_ai.")]
) -> None:
    """Write a run as a table of its samples, or as a log that `inspect view` opens."""
    from eval_jobs.inspect_log import write_inspect_log
    from eval_jobs.parquet import write_parquet
    from roentgen.runs import Run, RunError

    formats = {".parquet": write_parquet, ".eval": write_inspect_log}
    if output.suffix not in formats:
        raise typer.BadParameter(
            f"{output.name!r} says no format; allowed are names ending in {' and '.join(formats)}", param_hint="OUTPUT"
        )
    with expected_errors(RunError, OSError):
        output.parent.mkdir(parents=True, exist_ok=True)
        count = formats[output.suffix](Run.open(run), output)
    out.print(f"{count:,} samples in {output}", highlight=False, soft_wrap=True)


def status(run: RunPath) -> None:
    """Say how far a run is, also while it is running."""
    from eval_jobs.status import status as status_of
    from roentgen.runs import Run, RunError

    with expected_errors(RunError):
        out.print(str(status_of(Run.open(run))), highlight=False, soft_wrap=True)


def compare(
    first: RunPath, second: Annotated[Path, typer.Argument(help="Another one, on some of the same problems.")]
) -> None:
    """Compare two runs, problem by problem: the difference of their accuracies with its interval, and McNemar's test."""
    from eval_jobs.comparison import compare as compare_runs
    from eval_jobs.console import print_comparison
    from roentgen.runs import Run, RunError

    with expected_errors(RunError):
        print_comparison(compare_runs(Run.open(first), Run.open(second)), out)
