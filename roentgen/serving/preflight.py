"""Checks a server's configuration before Ray or anything else is started.

A start takes a minute, and loading a model longer, so a wrong option is reported within seconds. These checks read small files
and query the machine; everything that needs the model itself is checked when it is loaded.
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
    """The layers and hook points to capture, as settings and requests have them."""

    @property
    def layers(self) -> Any:
        """The layers, or "all"."""

    @property
    def hook_points(self) -> tuple[str, ...]:
        """The hook points."""


class PreflightError(RoentgenError):
    """A server with this configuration cannot be started on this machine; the message names the option."""


def check_start(config: ServerConfig, capture: Capture | None = None) -> None:
    """Check that this machine can serve a configuration.

    Args:
        config: the server's configuration.
        capture: what requests will capture; None if unknown.

    Raises:
        PreflightError: if it cannot; the message names the option and what is allowed.
    """
    check_device(config.device)
    for folder in config.probes:
        if not Path(folder).is_dir():
            raise PreflightError(f"--probes: {folder} is not a folder; `roentgen probe train RUN` creates RUN/probes")
    gpus = torch.cuda.device_count()
    if config.tensor_parallel_size > gpus and config.device == "cuda":
        raise PreflightError(
            f"--tensor-parallel-size: {config.tensor_parallel_size} is more than the {gpus} GPUs of this machine"
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
    """Check that a device is available.

    Raises:
        PreflightError: if it is not.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise PreflightError("--device: cuda is not available, because PyTorch finds no CUDA GPU; use cpu or auto")


def with_option_names(message: str) -> str:
    """Replace a request's parameter in a message by the option: `activations.hook_points: …` becomes `--hook-points: …`."""
    name, colon, rest = message.partition(": ")
    if colon and name.startswith("activations."):
        return f"--{name.removeprefix('activations.').replace('_', '-')}: {rest}"
    return message
