"""`roentgen eval`: the evaluation's own command, and with `--launch` the same evaluation on a cluster.

The evaluation's options are `EvalSettings`, the cluster's are `ClusterSettings`. With `--launch` they are checked before
anything is paid for, and what was given travels as it was given: the cluster's own `python -m eval_jobs` has the defaults.
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
"""Options of the evaluation that mean something else, or nothing, on the cluster."""

MAY_BE_FILES = ("problems", "prompt_file", "variants", "shots_source")
"""Options whose value may be a file on this machine."""

MAY_BE_REFERENCES = ("problems", "prompt", "extractor", "shots_source")
"""Options whose value may refer to something in a Python file of this machine."""


class LaunchOptions(BaseModel):
    """Options of `--launch` beside those of a cluster."""

    launch: bool = Field(False, description="Evaluate on a cluster in a cloud.")
    keep_running: bool = Field(False, description="Leave a new cluster running.")
    transfer_activations: bool = Field(
        False, description="Fetch the activations; by default only those that would end with the cluster."
    )
    remote_storage_only: bool = Field(False, description="Leave them where they are.")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.transfer_activations and self.remote_storage_only:
            raise ValueError("--transfer-activations and --remote-storage-only exclude one another")
        return self


@options_of(EvalSettings)
@options_of(LaunchOptions, panel="Cluster")
@options_of(ClusterSettings, leave_out={"fresh", "taps", *OF_THE_SERVER}, panel="Cluster", name="roentgen-eval")
def evaluate_or_launch(ctx: typer.Context, **options: Any) -> None:
    """Evaluate here, or with `--launch` on a cluster; what is shown as help is the evaluation's."""
    launch = {name: options.pop(name) for name in LaunchOptions.model_fields}
    cluster = {name: options.pop(name) for name in options.keys() - EvalSettings.model_fields.keys()}
    if launch["launch"]:
        _launch(ctx, launch, cluster, options)
        return
    if given := _given(ctx, launch | cluster):
        raise typer.BadParameter(f"{', '.join(given)}: only together with --launch")
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
                f"{', '.join(given)}: not together with --launch, which has a server and a Ray of its own"
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
    """Find out here what is wrong with an evaluation's options, before a machine is paid for; returns them.

    Raises:
        EvalError: naming the option.
    """
    settings = check_settings(**options)
    source = str(settings.problems)
    if source.startswith(HUB) and Path(hub_name(source)).expanduser().exists():
        raise EvalError(
            f"--problems: {source} is a folder of this machine, which the cluster lacks; allowed are a dataset of "
            "the hub and a .jsonl, .csv or .parquet file, which is sent"
        )
    if settings.problems not in SOURCES:
        load_problems(settings.selection.model_copy(update={"shots": 0}))
    if settings.shots_source is not None and is_reference(settings.shots_source):
        find_source(settings.shots_source)
    if settings.prompt is not None or settings.prompt_file is not None:
        choose_prompt(settings.prompt or "", settings.prompt_file)  # fixed shots are read there, as problems are
    if settings.variants is not None:
        read_variants(settings.variants)
    return settings


def taps_of(settings: EvalSettings) -> tuple[str, ...]:
    """Return what vLLM is to tap on a cluster: the default and what an evaluation adds to it, or nothing if it adds nothing."""
    added = [name for name in settings.hook_points if name not in DEFAULT_TAPS]
    return (DEFAULT_TAPS_NAME, *added) if added else ()


def named_files(options: dict[str, Any]) -> dict[str, Path | str]:
    """Return the files of this machine that the evaluation's options name, by option; of something in one, `file.py:name`.

    Raises:
        EvalError: if something in an installed package is named, which the cluster does not have.
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
                f"--{name}: {value} is of a package, which the cluster lacks; name it as path/to/file.py:name"
            )
        files[name] = found
    return files


def forwarded(ctx: typer.Context, *, leave_out: frozenset[str]) -> list[str]:
    """Return the evaluation's options as they were given, for its command line on the cluster."""
    words: list[str] = []
    for parameter in ctx.command.params:
        name = str(parameter.name)
        if name not in EvalSettings.model_fields or name in leave_out or not _is_given(ctx, name):
            continue
        value, flag = ctx.params[name], parameter.opts[0]
        words += [flag] if value is True else [flag, str(value)]
    return words


def _given(ctx: typer.Context, names: Collection[str]) -> list[str]:
    """Return the flags of those options, of these names, that were given."""
    return [one.opts[0] for one in ctx.command.params if one.name in names and _is_given(ctx, str(one.name))]


def _is_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
