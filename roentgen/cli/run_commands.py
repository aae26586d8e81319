"""Commands on a run directory: `roentgen report`, `score`, `export`, `status` and `compare`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from roentgen.cli.console import expected_errors, out, stages

RunPath = Annotated[Path, typer.Argument(help="A run directory.")]


def report(run: RunPath) -> None:
    """Rewrite a run's summary.json and report.html (with probe results, if there are any), and print the page's path."""
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
            help="The new primary extractor: a name, module:function or path/to/file.py:function.",
        ),
    ] = None,
) -> None:
    """Score a run's answers again, without the model, and print the scores."""
    from eval_jobs.terminal_summary import print_summary
    from roentgen.api.run_results import score as judge

    with expected_errors():
        again = judge(run, extractor)
        print_summary(again, again.summary() or {}, out)


def export(
    run: RunPath,
    output: Annotated[
        Path, typer.Argument(help="SAMPLES.parquet, LOG.eval for inspect_ai, PAGE.html, or a folder for the hf format.")
    ],
    kind: Annotated[
        Literal["parquet", "eval", "html", "hf"] | None,
        typer.Option("--format", help="Format. Default: by OUTPUT's extension."),
    ] = None,
    session: Annotated[
        str | None,
        typer.Option(help="hf format: a session captured from the run's answers. Default: the run's own activations."),
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="hf format: also upload to the Hugging Face Hub.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make the uploaded dataset public.")] = False,
) -> None:
    """Export a run as a table of samples, as a log for `inspect view`, or as a dataset with its activations."""
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
    """Show the progress of a run, finished or running."""
    from eval_jobs.status import status as status_of
    from roentgen.runs import Run

    with expected_errors():
        out.print(str(status_of(Run(run))), highlight=False, soft_wrap=True)


def compare(
    first: RunPath, second: Annotated[Path, typer.Argument(help="Another run, which shares problems with the first.")]
) -> None:
    """Compare two runs problem by problem: the difference in accuracy with its confidence interval, and McNemar's test."""
    from eval_jobs.terminal_summary import print_comparison
    from roentgen.api.run_results import compare as compare_runs

    with expected_errors():
        print_comparison(compare_runs(first, second), out)
