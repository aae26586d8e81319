"""What is made of a run: `roentgen report`, `score`, `export`, `status` and `compare`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from roentgen.cli.console import expected_errors, out, stages

RunPath = Annotated[Path, typer.Argument(help="A run directory.")]


def report(run: RunPath) -> None:
    """Write a run's summary.json and report.html again (with probe results, if there are any) and print the page's path."""
    from roentgen.api.results import report as write
    from roentgen.runs import RunError

    with expected_errors(RunError, OSError):
        out.print(str(write(run)), highlight=False, soft_wrap=True)


def score(
    run: RunPath,
    extractor: Annotated[
        str | None,
        typer.Option(help="The primary one from now on: a name, or module:function or path/to/file.py:function."),
    ] = None,
) -> None:
    """Judge a run's answers again, without the model, and print its scores."""
    from eval_jobs import EvalError
    from eval_jobs.console import print_summary
    from roentgen.api.results import score as judge
    from roentgen.runs import RunError

    with expected_errors(EvalError, RunError):
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
    from roentgen.runs import RunError
    from roentgen.store import StoreError

    suffixes = {".parquet": "parquet", ".eval": "eval"}
    kind = kind or ("hf" if push else suffixes.get(output.suffix))  # type: ignore[assignment]
    if kind is None:
        raise typer.BadParameter(
            f"{output.name!r} says no format; allowed are names ending in {' and '.join(suffixes)}, and --format hf for a "
            "folder",
            param_hint="OUTPUT",
        )
    given = {"--session": session is not None, "--push": push is not None, "--public": public}
    if kind != "hf" and (wrong := [name for name, there in given.items() if there]):
        raise typer.BadParameter(f"only --format hf has it, and this is {kind}", param_hint=wrong[0])
    with expected_errors(RunError, StoreError, OSError):
        if kind == "hf":
            _export_dataset(run, output, session, push, public)
        else:
            _export_samples(run, output, kind)


def _export_samples(run: Path, output: Path, kind: str) -> None:
    from eval_jobs.inspect_log import write_inspect_log
    from eval_jobs.parquet import write_parquet
    from roentgen.runs import Run

    output.parent.mkdir(parents=True, exist_ok=True)
    count = {"parquet": write_parquet, "eval": write_inspect_log}[kind](Run(run), output)
    out.print(f"{count:,} samples in {output}", highlight=False, soft_wrap=True)


def _export_dataset(run: Path, folder: Path, session: str | None, repository: str | None, public: bool) -> None:
    from roentgen.runs import Run
    from roentgen.workflows.dataset_export import ExportError, export_dataset, push

    with expected_errors(ExportError), stages() as stage:
        done = export_dataset(Run(run), folder, session, stage)
        samples, rollouts, *keys = done.tables
        rows = sum(key.rows for key in keys)
        what = f"{samples.rows:,} samples, {rollouts.rows:,} rollouts, {rows:,} rows of {len(keys)} keys"
        out.print(f"{what} in {folder}, {done.nbytes / 1e6:,.1f} MB", highlight=False, soft_wrap=True)
        for table in [samples, *keys[:1]]:
            out.print(f"datasets.load_dataset({str(folder)!r}, {table.name!r})", highlight=False, soft_wrap=True)
        if repository is not None:
            stage(f"sending it to {repository}")
            out.print(push(folder, repository, public=public), highlight=False, soft_wrap=True)


def status(run: RunPath) -> None:
    """Say how far a run is, also while it is running."""
    from eval_jobs.status import status as status_of
    from roentgen.runs import Run, RunError

    with expected_errors(RunError):
        out.print(str(status_of(Run(run))), highlight=False, soft_wrap=True)


def compare(
    first: RunPath, second: Annotated[Path, typer.Argument(help="Another one, on some of the same problems.")]
) -> None:
    """Compare two runs, problem by problem: the difference of their accuracies with its interval, and McNemar's test."""
    from eval_jobs.console import print_comparison
    from roentgen.api.results import compare as compare_runs
    from roentgen.runs import RunError

    with expected_errors(RunError):
        print_comparison(compare_runs(first, second), out)
