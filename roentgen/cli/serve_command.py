"""`roentgen serve`, and the server that `roentgen eval` starts if it has no `--base-url`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from roentgen.cli.console import LOADING, expected_errors, out, stages
from roentgen.defaults import HOST, PORT
from roentgen.options import options_of, read_options
from roentgen.ray_connection import check_address
from serve_app.config import ServerConfig

if TYPE_CHECKING:
    from eval_jobs.settings import EvalSettings


@contextmanager
def serve_for_eval(settings: "EvalSettings") -> Iterator[str]:
    """Start a server for an evaluation without `--base-url`; yields its base URL."""
    with stages() as stage:
        stage(LOADING)
        from roentgen.serving.for_evaluation import serving_for

        with serving_for(settings, stage) as base_url:
            stage.rest()
            yield base_url


@options_of(ServerConfig)
def serve(
    port: Annotated[int, typer.Option(help="Port; 0 chooses a free one.")] = PORT,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any other than loopback requires ROENTGEN_API_KEY.")
    ] = HOST,
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="Ray cluster: local starts one here; HOST:PORT joins one. Default: start one if it is needed (several "
            "replicas, a GPU, or vLLM)."
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option(help="Show the logs of the server and of Ray.")] = False,
    **options: Any,
) -> None:
    """Serve a model with an OpenAI-compatible API until interrupted."""
    with stages() as stage, expected_errors(ValueError):
        if ray_address is not None:
            check_address(ray_address)
        config = read_options(ServerConfig, options)
        stage(LOADING)
        from roentgen.serving.local_server import serving

        running = serving(config, host=host, port=port, ray_address=ray_address, stage=stage, verbose=verbose)
        with running as base_url:
            stage.rest()
            out.print(
                f"serving [bold]{config.model}[/bold] at [bold]{base_url}[/bold]  activations in {config.store}",
                highlight=False,
                soft_wrap=True,
            )
            out.print("press Ctrl-C to stop", highlight=False)
            wait_for_interrupt()


def wait_for_interrupt() -> None:
    """Block until the process gets SIGINT (Ctrl-C) or SIGTERM."""
    import signal

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        signal.pause()
    except KeyboardInterrupt:
        return
