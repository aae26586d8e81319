"""What is made of a finished run: `roentgen probe` and `roentgen report`."""

from pathlib import Path
from typing import Annotated

import typer

from roentgen.cli.console import err, expected_errors, out

probe_app = typer.Typer(no_args_is_help=True, help="Probes on stored activations.")


@probe_app.command("train")
def probe_train(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    label: Annotated[str, typer.Option(help="What to predict.")] = "correct",
    positions: Annotated[str, typer.Option(help="last_prompt, last, mean_prompt or mean_generated.")] = "last_prompt",
    seed: Annotated[int, typer.Option(help="Of the folds and the bootstrap.")] = 0,
    session: Annotated[
        str | None, typer.Option(help="STORE/SESSION of `roentgen capture`, instead of the run's own activations.")
    ] = None,
) -> None:
    """Train probes per layer and hook point; exit code 3 if the label has one class only."""
    from probes import OneClassError, ProbeDataError, render, train
    from roentgen.runs import RunError
    from roentgen.store import StoreError

    try:
        with expected_errors(ProbeDataError, RunError, StoreError):
            report = train(run, label=label, positions=positions, seed=seed, session=session)
    except OneClassError as error:
        err.print(f"[yellow]no probe:[/yellow] {error}", highlight=False)
        raise typer.Exit(3) from error
    out.print(render(report))


def report(run: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Write a run's report.html again (with probe results, if there are any) and print its path."""
    from eval_jobs.report import write_report
    from roentgen.runs import Run, RunError

    with expected_errors(RunError):
        out.print(str(write_report(Run.open(run))), highlight=False, soft_wrap=True)
