"""`roentgen eval`: run an evaluation here, or with `--launch` on a cluster.

The command's signature is assembled from three settings models, so that each option is declared once:

    EvalSettings     the evaluation            -> `evaluate` here, or `python -m eval_jobs` on the cluster
    LaunchOptions    what to do with a cluster -> `launch_and_evaluate`
    ClusterSettings  the cluster's machines    -> `launch_and_evaluate`

`evaluate_or_launch` splits the parsed options by these models again. With `--launch`, all options are checked before any
machine is paid for, and only the options that the user gave are forwarded: the cluster's `python -m eval_jobs` has the same
defaults.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any, Self

import typer
from pydantic import BaseModel, Field, model_validator

from eval_jobs import EvalError
from eval_jobs.command import evaluate
from eval_jobs.problems import SOURCES, find_source
from eval_jobs.prompts import choose_prompt
from eval_jobs.selection import load_problems
from eval_jobs.settings import EvalSettings, check_settings
from eval_jobs.tables import HUB, hub_name
from eval_jobs.variants import read_variants
from roentgen.cli.console import expected_errors, out, stages
from roentgen.cloud.task import ClusterSettings
from roentgen.contract import DEFAULT_TAPS, DEFAULT_TAPS_NAME
from roentgen.extensions import in_file, is_reference
from roentgen.options import options_of, read_options

OF_THE_SERVER = ("model", "revision", "dtype", "store")
STAYS_HERE = frozenset({"output", *OF_THE_SERVER, "base_url", "ray_address"})
"""Options of the evaluation that are not forwarded: on the cluster they have another meaning or none."""

MAY_BE_FILES = ("problems", "prompt_file", "variants", "shots_source")
"""Options whose value may be a file on this machine; it is sent to the cluster."""

MAY_BE_REFERENCES = ("problems", "prompt", "extractor", "shots_source")
"""Options whose value may refer to an object in a Python file on this machine."""


class LaunchOptions(BaseModel):
    """Options of `--launch` other than the cluster's own."""

    launch: bool = Field(False, description="Run the evaluation on a cloud cluster.")
    keep_running: bool = Field(False, description="Keep a new cluster running afterwards.")
    transfer_activations: bool = Field(
        False, description="Copy the activations here. Default: only those on the cluster's own disks."
    )
    remote_storage_only: bool = Field(False, description="Do not copy any activations here.")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.transfer_activations and self.remote_storage_only:
            raise ValueError(
                "--transfer-activations and --remote-storage-only are mutually exclusive; give one of them"
            )
        return self


@options_of(EvalSettings)
@options_of(LaunchOptions, panel="Cluster")
@options_of(ClusterSettings, leave_out={"fresh", "taps", *OF_THE_SERVER}, panel="Cluster", name="roentgen-eval")
def evaluate_or_launch(ctx: typer.Context, **options: Any) -> None:
    """Evaluate here, or with `--launch` on a cluster. The help text is that of `evaluate`."""
    launch = {name: options.pop(name) for name in LaunchOptions.model_fields}
    cluster = {name: options.pop(name) for name in options.keys() - EvalSettings.model_fields.keys()}
    if launch["launch"]:
        _launch(ctx, launch, cluster, options)
        return
    if given := _given(ctx, launch | cluster):
        raise typer.BadParameter(f"{', '.join(given)}: allowed only with --launch")
    evaluate(ctx, **options)


evaluate_or_launch.__doc__ = evaluate.__doc__


def _launch(ctx: typer.Context, launch: dict[str, Any], cluster: dict[str, Any], options: dict[str, Any]) -> None:
    from roentgen.cloud.evaluate import Afterwards, launch_and_evaluate
    from roentgen.cloud.skypilot import SkyPilot
    from roentgen.serving.local_server import LaunchError

    with stages() as stage, expected_errors():
        asked = _check(options)
        how = read_options(LaunchOptions, launch)
        if given := _given(ctx, ("base_url", "ray_address", "device", "quantize")):
            raise LaunchError(
                f"{', '.join(given)}: not allowed with --launch; the cluster has its own server and its own Ray"
            )
        served = {name: options[name] for name in OF_THE_SERVER if options[name] is not None}
        files = named_files(options)
        run = launch_and_evaluate(
            read_options(ClusterSettings, cluster | served | {"taps": ",".join(taps_of(asked))}),
            forwarded(ctx, leave_out=STAYS_HERE | files.keys()),
            Afterwards(
                keep_running=how.keep_running,
                transfer_activations=how.transfer_activations or (False if how.remote_storage_only else None),
                output=options["output"],
            ),
            SkyPilot(),
            stage,
            {f"--{name.replace('_', '-')}": file for name, file in files.items()},
        )
    out.print(f"the run is in [bold]{run}[/bold]", highlight=False, soft_wrap=True)


def _check(options: dict[str, Any]) -> EvalSettings:
    """Check an evaluation's options before a machine is paid for, and return the settings.

    Raises:
        EvalError: if an option is not allowed; the message names it.
    """
    settings = check_settings(**options)
    source = str(settings.problems)
    if source.startswith(HUB) and Path(hub_name(source)).expanduser().exists():
        raise EvalError(
            f"--problems: {source} is a folder on this machine, which the cluster does not have; allowed are a dataset of "
            "the hub and a .jsonl, .csv or .parquet file, which is sent"
        )
    if settings.problems not in SOURCES:
        load_problems(settings.selection.model_copy(update={"shots": 0}))
    if settings.shots_source is not None and is_reference(settings.shots_source):
        find_source(settings.shots_source)
    if settings.prompt is not None or settings.prompt_file is not None:
        choose_prompt(settings.prompt or "", settings.prompt_file)  # this also reads the fixed shots
    if settings.variants is not None:
        read_variants(settings.variants)
    return settings


def taps_of(settings: EvalSettings) -> tuple[str, ...]:
    """Return the `taps` setting for vLLM: the default plus the evaluation's other hook points; empty if there are none."""
    added = [name for name in settings.hook_points if name not in DEFAULT_TAPS]
    return (DEFAULT_TAPS_NAME, *added) if added else ()


def named_files(options: dict[str, Any]) -> dict[str, Path | str]:
    """Return the local files that the evaluation's options name, by option; for an object in a file, `file.py:name`.

    Raises:
        EvalError: if an option names an object in an installed package, which the cluster does not have.
    """
    files: dict[str, Path | str] = {
        name: Path(options[name]).expanduser().absolute()
        for name in MAY_BE_FILES
        if options[name] is not None and Path(options[name]).expanduser().is_file()
    }
    for name in MAY_BE_REFERENCES:
        value = options[name]
        if value is None or name in files or not is_reference(value):
            continue
        if (found := in_file(value)) is None:
            raise EvalError(
                f"--{name}: {value} is in a package, which the cluster does not have; name it as path/to/file.py:name"
            )
        files[name] = found
    return files


def forwarded(ctx: typer.Context, *, leave_out: frozenset[str]) -> list[str]:
    """Return the evaluation's options as the user gave them, as arguments for the command on the cluster."""
    words: list[str] = []
    for parameter in ctx.command.params:
        name = str(parameter.name)
        if name not in EvalSettings.model_fields or name in leave_out or not _is_given(ctx, name):
            continue
        value, flag = ctx.params[name], parameter.opts[0]
        words += [flag] if value is True else [flag, str(value)]
    return words


def _given(ctx: typer.Context, names: Collection[str]) -> list[str]:
    """Return the flags of the named options that the user gave."""
    return [one.opts[0] for one in ctx.command.params if one.name in names and _is_given(ctx, str(one.name))]


def _is_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
