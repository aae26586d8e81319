"""What is made of a run: `roentgen report`, `score`, `export`, `status` and `compare`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from roentgen.cli.console import expected_errors, out, stages

RunPath = Annotated[Path, typer.Argument(help="A run directory.")]


def report(run: RunPath) -> None:
    """Write a run's summary.json and report.html again (with probe results, if there are any) and print the page's path."""
    from roentgen.api.run_results import report as write

    with expected_errors(OSError):
        out.print(str(write(run)), highlight=False, soft_wrap=True)


def score(
    run: RunPath,
    extractor: Annotated[
        str | None,
        typer.Option(
            "--extractor",
            "--scorer",
            help="The primary one from now on: a name, or module:function or path/to/file.py:function.",
        ),
    ] = None,
) -> None:
    """Judge a run's answers again, without the model, and print its scores."""
    from eval_jobs.console import print_summary
    from roentgen.api.run_results import score as judge

    with expected_errors():
        again = judge(run, extractor)
        print_summary(again, again.summary() or {}, out)


def export(
    run: RunPath,
    output: Annotated[Path, typer.Argument(help="SAMPLES.parquet, LOG.eval for inspect_ai, or a folder for hf.")],
    kind: Annotated[
        Literal["parquet", "eval", "hf"] | None,
        typer.Option("--format", help="By default, what OUTPUT's name ends in."),
    ] = None,
    session: Annotated[
        str | None, typer.Option(help="For hf: a session that was captured of the run's answers; else its own rows.")
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="For hf: send it to the Hugging Face hub, too.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Let everybody see what --push makes.")] = False,
) -> None:
    """Write a run as a table of its samples, as a log that `inspect view` opens, or with its activations as a data set."""
    from roentgen.api.run_results import export as export_run

    with expected_errors(OSError), stages() as stage:
        done = export_run(run, output, kind, session=session, push_to=push, public=public, stage=stage)
    samples, *more = done.tables
    if not more:
        out.print(f"{samples.rows:,} samples in {output}", highlight=False, soft_wrap=True)
        return
    rollouts, *keys = more
    rows = sum(key.rows for key in keys)
    what = f"{samples.rows:,} samples, {rollouts.rows:,} rollouts, {rows:,} rows of {len(keys)} keys"
    out.print(f"{what} in {output}, {done.nbytes / 1e6:,.1f} MB", highlight=False, soft_wrap=True)
    for table in [samples, *keys[:1]]:
        out.print(f"datasets.load_dataset({str(output)!r}, {table.name!r})", highlight=False, soft_wrap=True)
    if done.address:
        out.print(done.address, highlight=False, soft_wrap=True)


def status(run: RunPath) -> None:
    """Say how far a run is, also while it is running."""
    from eval_jobs.status import status as status_of
    from roentgen.runs import Run

    with expected_errors():
        out.print(str(status_of(Run(run))), highlight=False, soft_wrap=True)


def compare(
    first: RunPath, second: Annotated[Path, typer.Argument(help="Another one, on some of the same problems.")]
) -> None:
    """Compare two runs, problem by problem: the difference of their accuracies with its interval, and McNemar's test."""
    from eval_jobs.console import print_comparison
    from roentgen.api.run_results import compare as compare_runs

    with expected_errors():
        print_comparison(compare_runs(first, second), out)
