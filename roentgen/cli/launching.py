"""`roentgen eval`: the evaluation's own command, and with `--launch` the same evaluation on a cluster.

The evaluation's options are declared once, in `eval_jobs.command`; those of the cluster are added here. With `--launch` they
are checked before anything is paid for, and what was given travels as it was given: the cluster's own `python -m eval_jobs` has
the defaults.
"""

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from eval_jobs import EvalError
from eval_jobs.command import evaluate
from eval_jobs.problems import SOURCES, read_source
from eval_jobs.settings import check_settings
from eval_jobs.variants import read_variants
from roentgen.cli.console import expected_errors, out, stage_printer

OF_THE_SERVER = ("model", "revision", "dtype", "store")
STAYS_HERE = frozenset({"output", *OF_THE_SERVER, "base_url", "ray_address"})
"""Options of the evaluation that mean something else, or nothing, on the cluster."""

MAY_BE_FILES = ("problems", "prompt_file", "variants")
"""Options whose value may be a file on this machine."""


def _cluster_options(
    launch: Annotated[
        bool, typer.Option("--launch", help="Evaluate on a cluster in a cloud.", rich_help_panel="Cluster")
    ] = False,
    cluster: Annotated[
        str | None,
        typer.Option("--cluster", "--gpu-id", help="Use exactly this running cluster.", rich_help_panel="Cluster"),
    ] = None,
    name: Annotated[str, typer.Option(help="Of a new cluster.", rich_help_panel="Cluster")] = "roentgen-eval",
    reuse: Annotated[
        bool, typer.Option("--reuse", help="Use the running cluster called --name.", rich_help_panel="Cluster")
    ] = False,
    engine: Annotated[
        str | None,
        typer.Option(help="vllm is installed if asked for; else transformers.", rich_help_panel="Cluster"),
    ] = None,
    min_vram: Annotated[
        int, typer.Option(help="GB of memory that a GPU must have; 0 for no GPU.", rich_help_panel="Cluster")
    ] = 16,
    gpus: Annotated[int, typer.Option(help="GPUs per node.", rich_help_panel="Cluster")] = 1,
    max_price: Annotated[float, typer.Option(help="Dollars per hour and node.", rich_help_panel="Cluster")] = 0.60,
    nodes: Annotated[int, typer.Option(help="Of the cluster.", rich_help_panel="Cluster")] = 1,
    spot: Annotated[
        bool, typer.Option("--spot", help="Machines that the provider may take back.", rich_help_panel="Cluster")
    ] = False,
    infra: Annotated[str | None, typer.Option(help="aws, aws/us-east-1, …", rich_help_panel="Cluster")] = None,
    port: Annotated[int, typer.Option(help="Of the server there.", rich_help_panel="Cluster")] = 8001,
    skip_sync: Annotated[bool, typer.Option("--skip-sync", help="Install nothing.", rich_help_panel="Cluster")] = False,
    frozen_sync: Annotated[
        bool, typer.Option("--frozen-sync", help="Install exactly the pins.", rich_help_panel="Cluster")
    ] = False,
    keep_running: Annotated[
        bool, typer.Option("--keep-running", help="Leave a new cluster running.", rich_help_panel="Cluster")
    ] = False,
    transfer_activations: Annotated[
        bool,
        typer.Option(
            "--transfer-activations",
            help="Fetch the activations; by default only those that would end with the cluster.",
            rich_help_panel="Cluster",
        ),
    ] = False,
    remote_storage_only: Annotated[
        bool, typer.Option("--remote-storage-only", help="Leave them where they are.", rich_help_panel="Cluster")
    ] = False,
) -> None:
    """Declare the options of a cluster; never called."""


_CLUSTER_OPTIONS = inspect.signature(_cluster_options).parameters


def evaluate_or_launch(ctx: typer.Context, **options: Any) -> None:
    """Evaluate here, or with `--launch` on a cluster; what is shown as help is the evaluation's."""
    of_cluster = {name: options.pop(name) for name in _CLUSTER_OPTIONS}
    if of_cluster["launch"]:
        _launch(ctx, of_cluster, options)
        return
    if given := [name for name in of_cluster if _is_given(ctx, name)]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise typer.BadParameter(f"{flags}: only together with --launch")
    evaluate(ctx, **options)


evaluate_or_launch.__doc__ = evaluate.__doc__
# Typer reads a command's options from its signature.
evaluate_or_launch.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [*inspect.signature(evaluate).parameters.values(), *_CLUSTER_OPTIONS.values()]
)
evaluate_or_launch.__annotations__ = {**evaluate.__annotations__, **_cluster_options.__annotations__}


def _launch(ctx: typer.Context, of_cluster: dict[str, Any], options: dict[str, Any]) -> None:
    from roentgen.cli.cluster import cluster_settings, sync_mode
    from roentgen.cloud.evaluate import Afterwards, launch_and_evaluate
    from roentgen.cloud.skypilot import SkyPilot
    from roentgen.serving.local_server import LaunchError

    with expected_errors(LaunchError, EvalError):
        _check(options)
        if of_cluster["transfer_activations"] and of_cluster["remote_storage_only"]:
            raise LaunchError("--transfer-activations and --remote-storage-only exclude one another")
        elsewhere = ("base_url", "ray_address", "device")
        if given := [f"--{name.replace('_', '-')}" for name in elsewhere if _is_given(ctx, name)]:
            raise LaunchError(
                f"{', '.join(given)}: not together with --launch, which has a server and a Ray of its own"
            )
        chosen = {
            name: of_cluster[name] for name in ("cluster", "name", "reuse", "min_vram", "gpus", "max_price", "nodes")
        }
        chosen |= {name: of_cluster[name] for name in ("spot", "infra", "port", "engine")}
        chosen |= {name: options[name] for name in OF_THE_SERVER if options[name] is not None}
        sync = sync_mode(of_cluster["skip_sync"], of_cluster["frozen_sync"], False)
        files = named_files(options)
        run = launch_and_evaluate(
            cluster_settings(**chosen, sync=sync),
            forwarded(ctx, leave_out=STAYS_HERE | files.keys()),
            Afterwards(
                keep_running=of_cluster["keep_running"],
                transfer_activations=of_cluster["transfer_activations"]
                or (False if of_cluster["remote_storage_only"] else None),
                output=options["output"],
            ),
            SkyPilot(),
            stage_printer(),
            {f"--{name.replace('_', '-')}": file for name, file in files.items()},
        )
    out.print(f"the run is in [bold]{run}[/bold]", highlight=False, soft_wrap=True)


def _check(options: dict[str, Any]) -> None:
    """Find out here what is wrong with an evaluation's options, before a machine is paid for.

    Raises:
        EvalError: naming the option.
    """
    settings = check_settings(**options)
    if settings.problems not in SOURCES:
        next(read_source(settings.problems))
    settings.chosen_prompt  # noqa: B018 - reads the prompt's file
    if settings.variants is not None:
        read_variants(settings.variants)


def named_files(options: dict[str, Any]) -> dict[str, Path]:
    """Return the files of this machine that the evaluation's options name, by option."""
    return {
        name: Path(options[name]).expanduser().absolute()
        for name in MAY_BE_FILES
        if options[name] is not None and Path(options[name]).expanduser().is_file()
    }


def forwarded(ctx: typer.Context, *, leave_out: frozenset[str]) -> list[str]:
    """Return the evaluation's options as they were given, for its command line on the cluster."""
    words: list[str] = []
    for parameter in ctx.command.params:
        name = str(parameter.name)
        if name in _CLUSTER_OPTIONS or name in leave_out or not _is_given(ctx, name):
            continue
        value, flag = ctx.params[name], parameter.opts[0]
        if isinstance(value, bool):
            words.append(flag if value else parameter.secondary_opts[0])
        else:
            words += [flag, str(value)]
    return words


def _is_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
