"""`roentgen up`, `roentgen smoke`, `roentgen doctor` and `roentgen cluster …`: the cluster, from a person's own machine."""

import os
import subprocess
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from roentgen.api_keys import client_key
from roentgen.cli.console import err, expected_errors, out, stages, table_of
from roentgen.cloud.task import ClusterSettings
from roentgen.defaults import CLUSTER_NAME, HOST, PORT
from roentgen.http_client import LAST_PORT, server_root
from roentgen.options import options_of, read_options

if TYPE_CHECKING:
    from roentgen.serving.doctor import Diagnosis

cluster_app = typer.Typer(no_args_is_help=True, help="A cluster that was launched.")

NOT_REACHED = 255
"""Ssh's exit code for a machine that it does not reach."""
NO_SSH = "error: there is no ssh here; install OpenSSH's client (apt install openssh-client)"

Name = Annotated[str, typer.Argument(help="The cluster.")]


@options_of(ClusterSettings, min_vram=12)
def up(
    validate_openapi: Annotated[bool, typer.Option(help="Check the server with one request when it is up.")] = True,
    **options: Any,
) -> None:
    """Launch a cluster that serves a model, or use one that runs, and check it. Leaves it running."""
    from roentgen.cloud.skypilot import SkyPilot
    from roentgen.cloud.up import up as bring_up

    with stages() as stage, expected_errors():
        settings = read_options(ClusterSettings, options)
        launched = bring_up(settings, SkyPilot(), stage, check=validate_openapi)
    out.print(
        f"[bold]{launched.name}[/bold] serves {settings.model}. It costs money until it is down. Next:", highlight=False
    )
    for command in launched.next_commands:
        out.print(f"  {command}", highlight=False, markup=False, soft_wrap=True)


def smoke(
    base: Annotated[str, typer.Argument(help="http://HOST:PORT")] = f"http://{HOST}:{PORT}",
    model: Annotated[str | None, typer.Option(help="Loaded if another is served.")] = None,
) -> None:
    """Check a server with one request: health, routes, model, an answer, and its activations read back."""
    from roentgen.serving.smoke import smoke as check

    with stages() as stage, expected_errors(ValueError):
        report = check(server_root(base), client_key(), stage, model=model)
    kept = ", ".join(report.tensors)
    out.print(f"{report.model} answers {report.answer!r}; {report.rows} rows of {kept} read back", soft_wrap=True)


def doctor(
    where: Annotated[
        str | None, typer.Argument(help="A cluster's name or http://HOST:PORT; absent: this machine.")
    ] = None,
    port: Annotated[
        int, typer.Option(min=1, max=LAST_PORT, help="Of the server on this machine or the cluster.")
    ] = PORT,
) -> None:
    """Say what is wrong with a server and what to do; exit code 1 if something is."""
    from roentgen.cloud.remote import Head
    from roentgen.serving.doctor import examine_here, examine_server

    if where is not None and "://" not in where and ":" not in where and where != "localhost":
        head = Head(where)
        done = _on_head(head.ssh(head.in_project("roentgen", "doctor", "--port", str(port))))
        if done == NOT_REACHED:
            err.print(
                f"error: no machine {where!r} is reached by ssh. SkyPilot writes the names of clusters into ~/.ssh/config "
                "(`roentgen cluster status` lists them; `make cloud-env` installs SkyPilot); a server's address is "
                "http://HOST:PORT",
                style="red", highlight=False, markup=False,
            )  # fmt: skip
            raise typer.Exit(2)
        raise typer.Exit(done)
    with expected_errors(ValueError):
        root = server_root(where or f"http://{HOST}:{port}")
    findings = examine_server(root, client_key())
    findings += [] if where else examine_here(port)
    out.print(_findings(findings))
    raise typer.Exit(1 if any(finding.verdict == "wrong" for finding in findings) else 0)


@cluster_app.command()
def status() -> None:
    """List the clusters, as their providers see them."""
    from roentgen.cloud.skypilot import SkyPilot

    with expected_errors():
        clusters = SkyPilot().clusters(refresh=True)
    table = table_of("cluster", "status", "nodes", "resources", "takes itself down")
    for one in clusters:
        idle = f"after {one.autostop} idle minutes" if one.autostop >= 0 else "never"
        table.add_row(one.name, one.status, str(one.nodes), one.resources, idle)
    out.print(table if clusters else "no clusters")


@cluster_app.command()
def logs(
    name: Name = CLUSTER_NAME,
    lines: Annotated[int, typer.Option(help="Of each log.")] = 50,
) -> None:
    """Show the ends of the newest job's log and of Serve's logs."""
    from roentgen.cloud.remote import Head
    from roentgen.cloud.skypilot import SkyPilot

    with expected_errors():
        SkyPilot().stream(["logs", name, "--no-follow", "--tail", str(lines)], _plain)
        _plain(Head(name).tail(lines))


@cluster_app.command()
def ssh(name: Name = CLUSTER_NAME) -> None:
    """Open a shell on the head node."""
    try:
        os.execvp("ssh", ["ssh", name])
    except FileNotFoundError:
        err.print(NO_SSH, style="red", highlight=False)
        raise typer.Exit(2) from None


@cluster_app.command()
def cost(name: Name = CLUSTER_NAME) -> None:
    """Show what clusters of a name have cost, as SkyPilot reckons."""
    from roentgen.cloud.skypilot import SkyPilot

    with expected_errors():
        entries = SkyPilot().cost(name)
    table = table_of("cluster", "status", "hours", "dollars")
    for entry in entries:
        hours = float(entry.get("duration") or 0) / 3600
        table.add_row(name, str(entry["status"]), f"{hours:.2f}", f"{float(entry.get('total_cost') or 0):.2f}")
    out.print(table if entries else f"SkyPilot knows of no cluster {name!r}")


@cluster_app.command()
def down(name: Name = CLUSTER_NAME) -> None:
    """Take a cluster down, and wait until its provider says that it is gone."""
    from roentgen.cloud.skypilot import SkyPilot

    with stages() as stage, expected_errors():
        gone = SkyPilot().down(name, stage)
    out.print(f"{name} is down: its provider says that {', '.join(gone) or 'every instance'} is gone", highlight=False)


def _on_head(command: list[str]) -> int:
    """Run a command that begins with ssh, and return its exit code; 255 is ssh's own, for a machine that it does not reach."""
    try:
        return subprocess.run(command, check=False).returncode
    except FileNotFoundError:
        err.print(NO_SSH, style="red", highlight=False)
        raise typer.Exit(2) from None


def _plain(text: str) -> None:
    err.print(text, markup=False, highlight=False)


def _findings(findings: "list[Diagnosis]") -> Table:
    colours = {"fine": "green", "note": "yellow", "wrong": "bold red"}
    table = table_of("", "what", "found", "what to do")
    for finding in findings:
        colour = colours[finding.verdict]
        table.add_row(f"[{colour}]{finding.verdict}[/{colour}]", finding.what, finding.text, finding.todo)
    return table
