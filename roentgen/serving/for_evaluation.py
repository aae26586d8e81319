"""The server that an evaluation starts when it is given none; the evaluation itself may not import one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from eval_jobs import EvalError
from eval_jobs.settings import EvalSettings
from roentgen.defaults import RESULTS
from roentgen.options import OptionError, read_options
from roentgen.ray_connection import ClusterError
from serve_app.config import ServerConfig


def config_for(settings: EvalSettings) -> ServerConfig:
    """Return the server that suits an evaluation: what is in flight is generated together, as far as the memory goes."""
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
    """Start the server for an evaluation; yields its base URL.

    Args:
        settings: the evaluation's.
        stage: told what is being done.

    Raises:
        EvalError: if it cannot be started.
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
