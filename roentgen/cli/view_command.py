"""`roentgen view`: the page to look at runs and sessions with."""

from typing import Annotated

import typer

from roentgen.cli.console import LOADING, expected_errors, out, stages


def view(
    addresses: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN|SESSION|STORE]...",
            help="Runs, sessions, or folders that hold some, on a disk or in a bucket; results and activations if absent.",
        ),
    ] = None,
    port: Annotated[int, typer.Option(help="0 chooses a free one.")] = 0,
    browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = True,
) -> None:
    """Look at runs and sessions in a browser: samples, tokens, activations, probes. Serves here until interrupted."""
    with stages() as stage, expected_errors(OSError):
        stage(LOADING)
        from roentgen.view.serving import viewing

        with viewing(addresses or [], port=port) as address:
            stage.rest()
            out.print(f"{address}", highlight=False, soft_wrap=True, markup=False)
            out.print("Ctrl-C stops it", highlight=False)
            if browser:
                import webbrowser

                webbrowser.open(address)
            from roentgen.cli.serve_command import wait_for_interrupt

            wait_for_interrupt()
