"""`roentgen serve`, and the server that `roentgen eval` starts when it is given none."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from roentgen.cli.console import describe, expected_errors, out, stage_printer

if TYPE_CHECKING:
    from eval_jobs.settings import EvalSettings
    from serve_app.config import ServerConfig


def server_config(**options: object) -> "ServerConfig":
    """Validate the server's options."""
    from serve_app.config import ServerConfig

    return ServerConfig.model_validate(options)


def config_for(settings: "EvalSettings") -> "ServerConfig":
    """Return the server that suits an evaluation: what is in flight is generated together, as far as the memory goes."""
    given = settings.model_dump(include={"model", "revision", "dtype", "device", "store"}, exclude_none=True)
    config = server_config(**given)
    if settings.parallel == "auto":
        return config
    return config.model_copy(update={"max_batch": max(config.max_batch, settings.parallel)})


@contextmanager
def serve_for_eval(settings: "EvalSettings") -> Iterator[str]:
    """Start Ray and the server for an evaluation that was given none; yields its base URL."""
    from pydantic import ValidationError

    from eval_jobs import EvalError
    from roentgen.cluster import ClusterError
    from roentgen.serving.local_server import LaunchError, serving
    from roentgen.store import StoreError

    try:
        running = serving(
            config_for(settings),
            ray_address=settings.ray_address or "local",
            stage=stage_printer(),
            verbose=settings.verbose,
        )
        with running as base_url:
            yield base_url
    except (ClusterError, LaunchError, StoreError, ValidationError) as error:
        raise EvalError(describe(error)) from error


def serve(
    model: Annotated[str, typer.Option(help="smollm2-135m (embedded), a folder, or a hub id.")] = "smollm2-135m",
    port: Annotated[int, typer.Option(help="0 chooses a free one.")] = 8000,
    host: Annotated[str, typer.Option(help="Anything but loopback needs ROENTGEN_API_KEY.")] = "127.0.0.1",
    store: Annotated[str, typer.Option(help="The activation store: a folder, or s3://BUCKET/FOLDER.")] = "activations",
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    engine: Annotated[str, typer.Option(help="auto (vLLM where it is, on a GPU), transformers or vllm.")] = "auto",
    capture: Annotated[bool, typer.Option(help="Whether requests may capture, steer and probe.")] = True,
    taps: Annotated[
        str, typer.Option(help="With vLLM: hook points that CUDA graphs serve, as resid_post,ln_mlp.")
    ] = "",
    tensor_parallel_size: Annotated[int, typer.Option(help="With vLLM: GPUs that a model is split over.")] = 1,
    device_map: Annotated[
        str | None, typer.Option(help="Spread the model: auto, balanced, sequential, or JSON {module: device}.")
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Requests generated together.")] = 32,
    max_queue: Annotated[int, typer.Option(help="Requests waiting for that; beyond, 429.")] = 256,
    request_timeout: Annotated[float, typer.Option(help="Seconds that a request may take; beyond, 408.")] = 3600,
    num_replicas: Annotated[int, typer.Option(help="Copies of the model.")] = 1,
    allow_model: Annotated[
        list[str] | None, typer.Option(help="A model that clients may load in its place; may be repeated.")
    ] = None,
    probes: Annotated[
        list[Path] | None, typer.Option(help="A folder whose saved probes requests may name; may be repeated.")
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with a model.")] = False,
    max_cache_tokens: Annotated[int, typer.Option(help="Size of the KV cache; 0 for what the memory allows.")] = 0,
    batch_invariant: Annotated[
        bool, typer.Option(help="Same bits whatever runs beside a request; slower (docs/reproducibility.md).")
    ] = False,
    threads: Annotated[int, typer.Option(help="Of a replica on a CPU; 0 for one per core.")] = 0,
    num_gpus: Annotated[float, typer.Option(help="GPUs per replica; 0 for one where there are any.")] = 0,
    ray_address: Annotated[str, typer.Option(help="'local' starts a Ray here; HOST:PORT joins one.")] = "local",
    verbose: Annotated[bool, typer.Option(help="Show Ray's and the replicas' logs.")] = False,
) -> None:
    """Serve a model behind the OpenAI route until interrupted."""
    from pydantic import ValidationError

    from roentgen.cluster import ClusterError, check_address
    from roentgen.serving.local_server import LaunchError, serving
    from roentgen.store import StoreError

    with expected_errors(ClusterError, LaunchError, StoreError, ValidationError, ValueError):
        check_address(ray_address)
        config = server_config(
            model=model,
            revision=revision,
            dtype=dtype,
            device=device,
            engine=engine,
            capture=capture,
            taps=taps,
            tensor_parallel_size=tensor_parallel_size,
            device_map=device_map,
            store=store,
            max_batch=max_batch,
            max_queue=max_queue,
            request_timeout_s=request_timeout,
            num_replicas=num_replicas,
            allowed_models=tuple(allow_model or ()),
            probes=tuple(str(folder) for folder in probes or ()),
            trust_remote_code=trust_remote_code,
            max_cache_tokens=max_cache_tokens,
            batch_invariant=batch_invariant,
            threads=threads,
            num_gpus=num_gpus,
        )
        running = serving(config, host=host, port=port, ray_address=ray_address, stage=stage_printer(), verbose=verbose)
        with running as base_url:
            out.print(
                f"serving [bold]{model}[/bold] at [bold]{base_url}[/bold]  activations in {config.store}",
                highlight=False,
            )
            out.print("Ctrl-C stops it", highlight=False)
            wait_for_interrupt()


def wait_for_interrupt() -> None:
    """Return when the process is asked to stop, by Ctrl-C or by SIGTERM."""
    import signal

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        signal.pause()
    except KeyboardInterrupt:
        return
