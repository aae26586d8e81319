"""`roentgen probe`: train, compare and apply probes on stored activations."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from roentgen.atomic_files import write_json
from roentgen.cli.console import LOADING, err, expected_errors, out, stages, table_of
from roentgen.options import options_of, read_options
from roentgen.stop_rule import StopSettings
from roentgen.workflows.command_settings import SteerSettings

probe_app = typer.Typer(no_args_is_help=True, help="Train and apply probes on stored activations.")


@contextmanager
def _exit_3_for_one_class() -> Iterator[None]:
    """Exit with code 3 if a label has only one class: there is no probe to train, but nothing is wrong."""
    from probes import OneClassError

    try:
        yield
    except OneClassError as error:
        err.print(f"[yellow]no probe:[/yellow] {error.for_console or error}", highlight=False)
        raise typer.Exit(3) from error


@probe_app.command("train")
def probe_train(
    sources: Annotated[list[str], typer.Argument(help="Run directories, or sessions of a store.")],
    label: Annotated[
        str,
        typer.Option(
            help="Label to predict: correct, truncated, difficulty, steps, a stored label, a column of --table, …"
        ),
    ] = "correct",
    positions: Annotated[
        str,
        typer.Option(
            help="Token positions, comma-separated: last_prompt, last, mean_prompt, mean_generated, before_answer, at:0.5, "
            "tokens."
        ),
    ] = "last_prompt",
    kind: Annotated[
        str | None,
        typer.Option(
            help="Kind of probe: logistic, mean_difference, lda, contrast, attention, ridge, multinomial, or your own, "
            "module:name or path/to/file.py:name. Default: the usual kind for the label."
        ),
    ] = None,
    declared: Annotated[
        str | None, typer.Option(help="A candidate declared in advance, such as layers.12.resid_post@last_prompt.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the folds and the bootstrap.")] = 0,
    session: Annotated[
        str | None,
        typer.Option(help="STORE/SESSION written by `roentgen capture`, used instead of the runs' own activations."),
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="Labels as a CSV or parquet file, joined on rollout_id or problem_id.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Output folder. Default for a single run: RUN/probes/LABEL.")
    ] = None,
    device: Annotated[str, typer.Option(help="Device to train on: cpu or cuda.")] = "cpu",
) -> None:
    """Train a probe for every layer and hook point. The exit code is 3 if the label has only one class."""
    with stages() as stage, expected_errors(), _exit_3_for_one_class():
        stage(LOADING)
        from probes import render
        from roentgen.probes import train

        trained = train(
            sources, label, [name.strip() for name in positions.split(",")], kind=kind, declared=declared,
            seed=seed, session=session, table=table, output=output, device=device, stage=stage,
        )  # fmt: skip
    out.print(render(trained.report))
    out.print(f"page: {trained.folder / 'report.html'}", highlight=False, markup=False, soft_wrap=True)


@probe_app.command("compare")
def probe_compare(
    first: Annotated[str, typer.Argument(help="A run directory or session, such as one without tools.")],
    second: Annotated[str, typer.Argument(help="Another one, such as one with tools.")],
    label: Annotated[str, typer.Option(help="Label to predict in both.")] = "correct",
    positions: Annotated[str, typer.Option(help="Token position.")] = "last_prompt",
    kind: Annotated[str | None, typer.Option(help="Kind of probe. Default: the usual kind for the label.")] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the folds, splits and bootstrap.")] = 0,
    table: Annotated[Path | None, typer.Option(help="Labels as a CSV or parquet file.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write the result to.")] = None,
) -> None:
    """Test probes of each run on the other, and compare their directions. The exit code is 3 if a label has only one class."""
    from probes import compare

    if output is not None and not output.absolute().parent.is_dir():
        raise typer.BadParameter(f"{output.parent} is not a folder", param_hint="--output")
    with expected_errors(), _exit_3_for_one_class():
        found = compare(first, second, label, positions, kind, seed, table)
    one, two = found.names
    shown = table_of(
        "key", f"{one} → {two}", f"{two} → {one}", "cosine", title=f"{label} at {positions}", title_justify="left"
    )
    for key in found.keys:
        shown.add_row(key.key, str(key.there), str(key.back), f"{key.cosine:.2f}")
    out.print(shown)
    if output is not None:
        with expected_errors(OSError):
            write_json(output, found.to_json())


@probe_app.command("steer")
@options_of(SteerSettings)
def probe_steer(**options: Any) -> None:
    """Generate with a probe's direction added, and with random control directions, and compare the answers."""
    with stages() as stage, expected_errors():
        settings = read_options(SteerSettings, options)
        stage(LOADING)
        from roentgen.workflows.steering_sweep import render, steer

        report = steer(settings, stage)
    out.print(render(report))


@probe_app.command("stop")
@options_of(StopSettings)
def probe_stop(**options: Any) -> None:
    """Estimate on stored rows what early stopping by a probe would save and cost, compared with simpler rules."""
    with stages() as stage, expected_errors():
        read_options(StopSettings, options)
        stage(LOADING)
        from probes import ProbeDataError
        from probes.steering import SweepError
        from roentgen.linear_probe import SavedProbeError
        from roentgen.probes.early_stopping import render, stop
        from roentgen.ray_connection import ClusterError
        from roentgen.runs import RunError
        from roentgen.serving.local_server import LaunchError
        from roentgen.store import StoreError

        refusals = (ClusterError, LaunchError, ProbeDataError, RunError, SavedProbeError, StoreError, SweepError)
        with expected_errors(*refusals):
            report = stop(**options, stage=stage)
    out.print(render(report))
    out.print(f"page: {Path(report.folder) / 'stopping.html'}", highlight=False, markup=False, soft_wrap=True)
