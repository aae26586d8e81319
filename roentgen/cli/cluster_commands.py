"""`roentgen up`, `roentgen smoke`, `roentgen doctor` and `roentgen cluster …`: manage a cluster from a local machine."""

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

cluster_app = typer.Typer(no_args_is_help=True, help="Manage launched clusters.")

NOT_REACHED = 255
"""Exit code of ssh if it cannot reach the machine."""
NO_SSH = "error: ssh is not installed; install the OpenSSH client (apt install openssh-client)"

Name = Annotated[str, typer.Argument(help="Name of the cluster.")]


@options_of(ClusterSettings, min_vram=12)
def up(
    validate_openapi: Annotated[bool, typer.Option(help="Check the server with one request once it is up.")] = True,
    **options: Any,
) -> None:
    """Launch a cluster that serves a model, or use a running one, and check it. The cluster keeps running."""
    from roentgen.cloud.skypilot import SkyPilot
    from roentgen.cloud.up import up as bring_up

    with stages() as stage, expected_errors():
        settings = read_options(ClusterSettings, options)
        launched = bring_up(settings, SkyPilot(), stage, check=validate_openapi)
    out.print(
        f"[bold]{launched.name}[/bold] serves {settings.model}. It costs money until you take it down. Next:",
        highlight=False,
    )
    for command in launched.next_commands:
        out.print(f"  {command}", highlight=False, markup=False, soft_wrap=True)


def smoke(
    base: Annotated[str, typer.Argument(help="http://HOST:PORT")] = f"http://{HOST}:{PORT}",
    model: Annotated[
        str | None, typer.Option(help="Model to check; it is loaded if the server has another one.")
    ] = None,
) -> None:
    """Check a server with one request: health, routes, model, an answer, and reading its activations back."""
    from roentgen.serving.smoke import smoke as check

    with stages() as stage, expected_errors(ValueError):
        report = check(server_root(base), client_key(), stage, model=model)
    kept = ", ".join(report.tensors)
    out.print(f"{report.model} answers {report.answer!r}; {report.rows} rows of {kept} read back", soft_wrap=True)


def doctor(
    where: Annotated[
        str | None, typer.Argument(help="Name of a cluster, or http://HOST:PORT. Default: this machine.")
    ] = None,
    port: Annotated[
        int, typer.Option(min=1, max=LAST_PORT, help="Port of the server on this machine or the cluster.")
    ] = PORT,
) -> None:
    """Diagnose a server and say how to fix what is wrong. The exit code is 1 if something is wrong."""
    from roentgen.cloud.remote import Head
    from roentgen.serving.doctor import examine_here, examine_server

    if where is not None and "://" not in where and ":" not in where and where != "localhost":
        head = Head(where)
        done = _on_head(head.ssh(head.in_project("roentgen", "doctor", "--port", str(port))))
        if done == NOT_REACHED:
            err.print(
                f"error: ssh cannot reach a machine {where!r}. SkyPilot writes the names of clusters into ~/.ssh/config "
                "(`roentgen cluster status` lists them; `make cloud-env` installs SkyPilot). To check a server by its address, "
                "give http://HOST:PORT",
                style="red", highlight=False, markup=False,
            )  # fmt: skip
            raise typer.Exit(2)
        raise typer.Exit(done)
    with expected_errors(ValueError):
        root = server_root(where or f"http://{HOST}:{port}")
    findings = examine_server(root, client_key())
    findings += [] if where else examine_here(port)
    out.print(_diagnosis_table(findings))
    raise typer.Exit(1 if any(finding.verdict == "wrong" for finding in findings) else 0)


@cluster_app.command()
def status() -> None:
    """List the clusters, with the status that their providers report."""
    from roentgen.cloud.skypilot import SkyPilot

    with expected_errors():
        clusters = SkyPilot().clusters(refresh=True)
    table = table_of("cluster", "status", "nodes", "resources", "terminates itself")
    for one in clusters:
        idle = f"after {one.autostop} idle minutes" if one.autostop >= 0 else "never"
        table.add_row(one.name, one.status, str(one.nodes), one.resources, idle)
    out.print(table if clusters else "no clusters")


@cluster_app.command()
def logs(
    name: Name = CLUSTER_NAME,
    lines: Annotated[int, typer.Option(help="Number of lines of each log.")] = 50,
) -> None:
    """Show the last lines of the newest job's log and of Serve's logs."""
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
    """Show what clusters of this name have cost, by SkyPilot's estimate."""
    from roentgen.cloud.skypilot import SkyPilot

    with expected_errors():
        entries = SkyPilot().cost(name)
    table = table_of("cluster", "status", "hours", "dollars")
    for entry in entries:
        hours = float(entry.get("duration") or 0) / 3600
        table.add_row(name, str(entry["status"]), f"{hours:.2f}", f"{float(entry.get('total_cost') or 0):.2f}")
    out.print(table if entries else f"SkyPilot knows no cluster {name!r}")


@cluster_app.command()
def down(name: Name = CLUSTER_NAME) -> None:
    """Terminate a cluster, and wait until its provider confirms it."""
    from roentgen.cloud.skypilot import SkyPilot

    with stages() as stage, expected_errors():
        gone = SkyPilot().down(name, stage)
    out.print(
        f"{name} is down: its provider confirms that {', '.join(gone) or 'every instance'} is terminated",
        highlight=False,
    )


def _on_head(command: list[str]) -> int:
    """Run an ssh command and return its exit code, `NOT_REACHED` if ssh cannot reach the machine."""
    try:
        return subprocess.run(command, check=False).returncode
    except FileNotFoundError:
        err.print(NO_SSH, style="red", highlight=False)
        raise typer.Exit(2) from None


def _plain(text: str) -> None:
    err.print(text, markup=False, highlight=False)


def _diagnosis_table(findings: "list[Diagnosis]") -> Table:
    colors = {"fine": "green", "note": "yellow", "wrong": "bold red"}
    table = table_of("", "what", "found", "what to do")
    for finding in findings:
        color = colors[finding.verdict]
        table.add_row(f"[{color}]{finding.verdict}[/{color}]", finding.what, finding.text, finding.todo)
    return table
