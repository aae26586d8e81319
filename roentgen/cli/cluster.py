"""`roentgen up`, `roentgen smoke`, `roentgen doctor` and `roentgen cluster …`: the cluster, from a person's own machine."""

import os
import subprocess
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from roentgen.api_keys import client_key
from roentgen.cli.console import err, expected_errors, out, stage_printer

if TYPE_CHECKING:
    from roentgen.cloud.task import ClusterSettings
    from roentgen.serving.doctor import Finding

cluster_app = typer.Typer(no_args_is_help=True, help="A cluster that was launched.")

DEFAULT_NAME = "roentgen"
Name = Annotated[str, typer.Argument(help="The cluster.")]


def up(
    model: Annotated[str, typer.Option(help="The model to serve.")] = "Qwen/Qwen3-0.6B",
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    engine: Annotated[str | None, typer.Option(help="vllm is installed if asked for; else transformers.")] = None,
    min_vram: Annotated[int, typer.Option(help="GB of memory that a GPU must have; 0 for no GPU.")] = 12,
    gpus: Annotated[int, typer.Option(help="GPUs per node.")] = 1,
    max_price: Annotated[float, typer.Option(help="Dollars per hour and node.")] = 0.60,
    port: Annotated[int, typer.Option(help="Of the server, there and at this end of the tunnel.")] = 8001,
    name: Annotated[str, typer.Option(help="Of the cluster.")] = DEFAULT_NAME,
    cluster: Annotated[
        str | None, typer.Option("--cluster", "--gpu-id", help="Use exactly this running cluster.")
    ] = None,
    reuse: Annotated[
        bool, typer.Option("--reuse", help="Use the running cluster called --name, if there is one.")
    ] = False,
    skip_sync: Annotated[bool, typer.Option("--skip-sync", help="Reused: sync and install nothing (fastest).")] = False,
    frozen_sync: Annotated[bool, typer.Option("--frozen-sync", help="Install exactly the pinned versions.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Reused: install again from nothing.")] = False,
    nodes: Annotated[int, typer.Option(help="Of the cluster.")] = 1,
    max_replicas: Annotated[int, typer.Option(help="Copies of the model under load; 0 for one per GPU.")] = 0,
    spot: Annotated[bool, typer.Option("--spot", help="Cheaper machines that the provider may take back.")] = False,
    infra: Annotated[str | None, typer.Option(help="aws, aws/us-east-1, …; anywhere if absent.")] = None,
    store: Annotated[str, typer.Option(help="s3://BUCKET/FOLDER, or a folder there.")] = "",
    open_port: Annotated[
        bool, typer.Option("--open-port", help="Open the port to the Internet, behind a key.")
    ] = False,
    idle_minutes: Annotated[int, typer.Option(help="Until the cluster takes itself down.")] = 15,
    validate_openapi: Annotated[bool, typer.Option(help="Check the server with one request when it is up.")] = True,
) -> None:
    """Launch a cluster that serves a model, or use one that runs, and check it. Leaves it running."""
    from roentgen.cloud.skypilot import SkyPilot
    from roentgen.cloud.up import up as bring_up
    from roentgen.serving.local_server import LaunchError

    stage = stage_printer()
    with expected_errors(LaunchError):
        settings = cluster_settings(
            model=model, revision=revision, dtype=dtype, engine=engine, min_vram=min_vram, gpus=gpus,
            max_price=max_price, port=port, name=name, cluster=cluster, reuse=reuse,
            sync=sync_mode(skip_sync, frozen_sync, fresh), nodes=nodes, max_replicas=max_replicas, spot=spot,
            infra=infra, store=store, open_port=open_port, idle_minutes=idle_minutes,
        )  # fmt: skip
        launched = bring_up(settings, SkyPilot(), stage, check=validate_openapi)
    out.print(f"[bold]{launched.name}[/bold] serves {model}. It costs money until it is down. Next:", highlight=False)
    for command in launched.next_commands:
        out.print(f"  {command}", highlight=False, markup=False, soft_wrap=True)


def smoke(
    base: Annotated[str, typer.Argument(help="http://HOST:PORT")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Loaded if another is served.")] = None,
) -> None:
    """Check a server with one request: health, routes, model, an answer, and its activations read back."""
    from roentgen.serving.local_server import LaunchError
    from roentgen.serving.smoke import smoke as check

    with expected_errors(LaunchError):
        report = check(_root(base), client_key(), stage_printer(), model=model)
    kept = ", ".join(report.tensors)
    out.print(f"{report.model} answers {report.answer!r}; {report.rows} rows of {kept} read back", soft_wrap=True)


def doctor(
    where: Annotated[
        str | None, typer.Argument(help="A cluster's name or http://HOST:PORT; absent: this machine.")
    ] = None,
    port: Annotated[int, typer.Option(help="Of the server on this machine or the cluster.")] = 8000,
) -> None:
    """Say what is wrong with a server and what to do; exit code 1 if something is."""
    from roentgen.cloud.remote import Head
    from roentgen.serving.doctor import examine_here, examine_server

    if where is not None and not where.startswith(("http://", "https://")):
        head = Head(where)
        command = head.ssh(head.in_project("roentgen", "doctor", "--port", str(port)))
        raise typer.Exit(subprocess.run(command, check=False).returncode)
    findings = examine_server(_root(where or f"http://127.0.0.1:{port}"), client_key())
    findings += [] if where else examine_here(port)
    out.print(_findings(findings))
    raise typer.Exit(1 if any(finding.verdict == "wrong" for finding in findings) else 0)


@cluster_app.command()
def status() -> None:
    """List the clusters, as their providers see them."""
    from roentgen.cloud.skypilot import SkyPilot
    from roentgen.serving.local_server import LaunchError

    with expected_errors(LaunchError):
        clusters = SkyPilot().clusters(refresh=True)
    table = Table("cluster", "status", "nodes", "resources", "takes itself down")
    for one in clusters:
        idle = f"after {one.autostop} idle minutes" if one.autostop >= 0 else "never"
        table.add_row(one.name, one.status, str(one.nodes), one.resources, idle)
    out.print(table if clusters else "no clusters")


@cluster_app.command()
def logs(
    name: Name = DEFAULT_NAME,
    lines: Annotated[int, typer.Option(help="Of each log.")] = 50,
) -> None:
    """Show the ends of the newest job's log and of Serve's logs."""
    from roentgen.cloud.remote import Head
    from roentgen.cloud.skypilot import SkyPilot
    from roentgen.serving.local_server import LaunchError

    with expected_errors(LaunchError):
        SkyPilot().stream(["logs", name, "--no-follow", "--tail", str(lines)], _plain)
        _plain(Head(name).tail(lines))


@cluster_app.command()
def ssh(name: Name = DEFAULT_NAME) -> None:
    """Open a shell on the head node."""
    os.execvp("ssh", ["ssh", name])


@cluster_app.command()
def cost(name: Name = DEFAULT_NAME) -> None:
    """Show what clusters of a name have cost, as SkyPilot reckons."""
    from roentgen.cloud.skypilot import SkyPilot
    from roentgen.serving.local_server import LaunchError

    with expected_errors(LaunchError):
        entries = SkyPilot().cost(name)
    table = Table("cluster", "status", "hours", "dollars")
    for entry in entries:
        hours = float(entry.get("duration") or 0) / 3600
        table.add_row(name, str(entry["status"]), f"{hours:.2f}", f"{float(entry.get('total_cost') or 0):.2f}")
    out.print(table if entries else f"SkyPilot knows of no cluster {name!r}")


@cluster_app.command()
def down(name: Name = DEFAULT_NAME) -> None:
    """Take a cluster down, and wait until its provider says that it is gone."""
    from roentgen.cloud.skypilot import SkyPilot
    from roentgen.serving.local_server import LaunchError

    with expected_errors(LaunchError):
        gone = SkyPilot().down(name, stage_printer())
    out.print(f"{name} is down: its provider says that {', '.join(gone) or 'every instance'} is gone", highlight=False)


def cluster_settings(**options: object) -> "ClusterSettings":
    """Validate the options of a cluster.

    Raises:
        LaunchError: naming the option.
    """
    from pydantic import ValidationError

    from roentgen.cloud.task import ClusterSettings
    from roentgen.serving.local_server import LaunchError

    try:
        return ClusterSettings.model_validate(options)
    except ValidationError as error:
        lines = [
            f"{'--' + str(e['loc'][0]).replace('_', '-') + ': ' if e['loc'] else ''}{e['msg'].removeprefix('Value error, ')}"
            + (f" (given: {e['input']!r})" if e["loc"] else "")
            for e in error.errors()
        ]
        raise LaunchError("; ".join(lines)) from error


def sync_mode(skip: bool, frozen: bool, fresh: bool) -> str:
    """Return what is installed on a cluster.

    Raises:
        LaunchError: if more than one is asked for.
    """
    from roentgen.serving.local_server import LaunchError

    given = [mode for mode, asked in (("skip", skip), ("frozen", frozen), ("fresh", fresh)) if asked]
    if len(given) > 1:
        raise LaunchError("--skip-sync, --frozen-sync and --fresh exclude one another")
    return given[0] if given else "full"


def _root(base: str) -> str:
    return base.rstrip("/").removesuffix("/v1")


def _plain(text: str) -> None:
    err.print(text, markup=False, highlight=False)


def _findings(findings: "list[Finding]") -> Table:
    colours = {"fine": "green", "note": "yellow", "wrong": "bold red"}
    table = Table("", "what", "found", "what to do")
    for finding in findings:
        colour = colours[finding.verdict]
        table.add_row(f"[{colour}]{finding.verdict}[/{colour}]", finding.what, finding.text, finding.todo)
    return table
