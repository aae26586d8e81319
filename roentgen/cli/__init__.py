"""The `roentgen` command. Each subcommand calls one function of another package and prints its result.

Each module contains related subcommands. A subcommand imports what it needs when it runs, so that `roentgen --help` does not
import torch.
"""

from typing import Annotated

import typer

from roentgen.cli.capture_commands import capture, verify
from roentgen.cli.cluster_commands import cluster_app, doctor, smoke, up
from roentgen.cli.eval_command import evaluate_or_launch
from roentgen.cli.inspect_command import inspect
from roentgen.cli.join_command import join
from roentgen.cli.probe_commands import probe_app
from roentgen.cli.run_commands import compare, export, report, score, status
from roentgen.cli.serve_command import serve, serve_for_eval
from roentgen.cli.session_commands import sessions_app
from roentgen.cli.show_command import show
from roentgen.cli.view_command import view
from roentgen.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Evaluate a language model and store its internal activations.",
)


def _print_version(requested: bool) -> None:
    if requested:
        print(__version__)
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Evaluate a language model and store its internal activations."""
    # `eval` without --base-url starts a server by this function, because eval_jobs may not import serve_app.
    context.obj = serve_for_eval


app.command()(serve)
app.command(name="eval")(evaluate_or_launch)
app.command()(capture)
app.command(name="verify-capture")(verify)
app.command()(inspect)
app.command()(report)
app.command()(score)
app.command()(export)
app.command()(show)
app.command()(view)
app.command()(join)
app.command()(status)
app.command()(compare)
app.command()(up)
app.command()(smoke)
app.command()(doctor)
app.add_typer(cluster_app, name="cluster")
app.add_typer(sessions_app, name="sessions")
app.add_typer(probe_app, name="probe")
