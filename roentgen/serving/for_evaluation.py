"""Starts a server for an evaluation without `--base-url`. The package `eval_jobs` itself may not import a server."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from eval_jobs import EvalError
from eval_jobs.settings import EvalSettings
from roentgen.defaults import RESULTS
from roentgen.options import OptionError, read_options
from roentgen.ray_connection import ClusterError
from serve_app.config import ServerConfig


def config_for(settings: EvalSettings) -> ServerConfig:
    """Return the configuration of an evaluation's server; its batch holds all requests in flight."""
    given = settings.model_dump(
        include={"model", "revision", "dtype", "quantize", "device", "store"}, exclude_none=True
    )
    runs = (str(settings.output or RESULTS),)
    config = read_options(ServerConfig, given | {"capture": settings.collect_activations, "view_runs": runs})
    if settings.parallel == "auto":
        return config
    return config.model_copy(update={"max_batch": max(config.max_batch, settings.parallel)})


@contextmanager
def serving_for(settings: EvalSettings, stage: Callable[[str], None]) -> Iterator[str]:
    """Serve a model for an evaluation within a context; yields the base URL.

    Args:
        settings: the evaluation's settings.
        stage: called with each stage of the start.

    Raises:
        EvalError: if the server cannot be started.
    """
    from roentgen.serving.local_server import LaunchError, serving
    from roentgen.store import StoreError

    try:
        running = serving(
            config_for(settings),
            ray_address=settings.ray_address,
            stage=stage,
            verbose=settings.verbose,
            capture=settings if settings.collect_activations else None,
        )
        with running as base_url:
            yield base_url
    except (ClusterError, LaunchError, OptionError, StoreError) as error:
        raise EvalError(str(error)) from error
