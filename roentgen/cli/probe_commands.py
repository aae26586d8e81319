"""Probes on stored activations: `roentgen probe`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from roentgen.atomic_files import write_json
from roentgen.cli.console import LOADING, err, expected_errors, out, stages, table_of
from roentgen.options import options_of, read_options
from roentgen.stopping import StopSettings
from roentgen.workflows.command_settings import SteerSettings

probe_app = typer.Typer(no_args_is_help=True, help="Probes on stored activations.")


@contextmanager
def _one_class_is_no_error() -> Iterator[None]:
    """End with 3 where a label has one class only: nothing is wrong, and there is no probe."""
    from probes import OneClassError

    try:
        yield
    except OneClassError as error:
        err.print(f"[yellow]no probe:[/yellow] {error.for_console or error}", highlight=False)
        raise typer.Exit(3) from error


@probe_app.command("train")
def probe_train(
    sources: Annotated[list[str], typer.Argument(help="Run directories, or sessions of the store.")],
    label: Annotated[
        str, typer.Option(help="What to read: correct, truncated, difficulty, steps, a stored label, a table's column…")
    ] = "correct",
    positions: Annotated[
        str,
        typer.Option(
            help="Where, comma-separated: last_prompt, last, mean_prompt, mean_generated, before_answer, at:0.5, tokens."
        ),
    ] = "last_prompt",
    kind: Annotated[
        str | None,
        typer.Option(
            help="logistic, mean_difference, lda, contrast, attention, ridge or multinomial, or a kind of one's own, "
            "module:name or path/to/file.py:name; else the label's usual."
        ),
    ] = None,
    declared: Annotated[
        str | None, typer.Option(help="A candidate named beforehand, layers.12.resid_post@last_prompt.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the folds and the bootstrap.")] = 0,
    session: Annotated[
        str | None, typer.Option(help="STORE/SESSION of `roentgen capture`, instead of the runs' own activations.")
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="Labels as CSV or parquet, joined on rollout_id or problem_id.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The folder; RUN/probes/LABEL for a single run.")] = None,
    device: Annotated[str, typer.Option(help="Where to fit: cpu or cuda.")] = "cpu",
) -> None:
    """Train probes per layer and hook point; exit code 3 if the label has one class only."""
    with stages() as stage, expected_errors(), _one_class_is_no_error():
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
    first: Annotated[str, typer.Argument(help="A run directory or session, say without tools.")],
    second: Annotated[str, typer.Argument(help="Another, say with tools.")],
    label: Annotated[str, typer.Option(help="What to read in each.")] = "correct",
    positions: Annotated[str, typer.Option(help="Where to read.")] = "last_prompt",
    kind: Annotated[str | None, typer.Option(help="Of probe; else the label's usual.")] = None,
    seed: Annotated[int, typer.Option(help="Of folds, deals and bootstrap.")] = 0,
    table: Annotated[Path | None, typer.Option(help="Labels as CSV or parquet.")] = None,
    output: Annotated[Path | None, typer.Option(help="A JSON file to write as well.")] = None,
) -> None:
    """Carry probes from one run to another and back, and compare their directions; exit code 3 for one class only."""
    from probes import compare

    if output is not None and not output.absolute().parent.is_dir():
        raise typer.BadParameter(f"{output.parent} is not a folder", param_hint="--output")
    with expected_errors(), _one_class_is_no_error():
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
    """Answer problems with a probe's direction added, and along directions that know nothing, and compare."""
    with stages() as stage, expected_errors():
        settings = read_options(SteerSettings, options)
        stage(LOADING)
        from roentgen.workflows.steering_sweep import render, steer

        report = steer(settings, stage)
    out.print(render(report))


@probe_app.command("stop")
@options_of(StopSettings)
def probe_stop(**options: Any) -> None:
    """Find on stored rows what a probe that ends answers early would save and cost, beside simpler rules."""
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
