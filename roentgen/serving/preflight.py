"""What a server's configuration alone shows to be wrong, said before Ray or anything else is started.

A start takes a minute, and a model's loading longer; whoever wrote one word wrongly should hear of it in seconds. What is here
reads small files and asks the machine; whatever only the model itself can tell is left to its loading.
"""

from pathlib import Path
from typing import Any, Protocol

import torch

from roentgen.errors import RoentgenError
from serve_app.config import ServerConfig
from serve_app.engines.vllm.requirements import check_available
from serve_app.errors import RequestError
from serve_app.models.description import describe
from serve_app.models.model_source import locate


class Capture(Protocol):
    """What is to be captured, as settings and requests have it."""

    @property
    def layers(self) -> Any:
        """Layers, or "all"."""

    @property
    def hook_points(self) -> tuple[str, ...]:
        """Hook points."""


class PreflightError(RoentgenError):
    """A server with this configuration cannot be started on this machine; the message names the option."""


def check_start(config: ServerConfig, capture: Capture | None = None) -> None:
    """Refuse a configuration that cannot be served on this machine.

    Args:
        config: the server's.
        capture: what it is going to be asked for, None for nothing.

    Raises:
        PreflightError: saying what is wrong and what is allowed.
    """
    check_device(config.device)
    for folder in config.probes:
        if not Path(folder).is_dir():
            raise PreflightError(f"--probes: {folder} is not a folder; `roentgen probe train RUN` makes RUN/probes")
    gpus = torch.cuda.device_count()
    if config.tensor_parallel_size > gpus and config.device == "cuda":
        raise PreflightError(
            f"--tensor-parallel-size: {config.tensor_parallel_size} GPUs are asked for; here are {gpus}"
        )
    try:
        source = locate(
            config.model, config.revision, quantize=config.quantize, trust_remote_code=config.trust_remote_code
        )
        description = describe(source, trust_remote_code=config.trust_remote_code)
        if config.engine == "vllm":
            check_available(source, device=config.device, batch_invariant=config.batch_invariant)
        if capture is not None:
            description.check_capture(capture.layers, capture.hook_points)
    except RequestError as error:
        raise PreflightError(with_option_names(str(error))) from error


def check_device(device: str) -> None:
    """Refuse a device that is not here.

    Raises:
        PreflightError: naming the ways out.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise PreflightError("--device: cuda is asked for, and PyTorch finds no CUDA GPU here; use cpu, or auto")


def with_option_names(message: str) -> str:
    """Spell a request's parameter as the command line's option: `activations.hook_points: …` as `--hook-points: …`."""
    name, colon, rest = message.partition(": ")
    if colon and name.startswith("activations."):
        return f"--{name.removeprefix('activations.').replace('_', '-')}: {rest}"
    return message
