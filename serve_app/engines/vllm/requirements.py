"""Checks vLLM's requirements on a machine and a model, before any of vLLM is imported."""

import importlib.util

import torch

from serve_app.errors import RequestError
from serve_app.models.model_source import ModelSource

BATCH_INVARIANT_FROM = (8, 0)
"""Compute capability that vLLM's batch-invariant mode requires (its documentation, 0.32)."""


class EngineUnavailableError(RequestError):
    """vLLM cannot be used here; the message says why."""

    code = "engine_unavailable"


def installed() -> bool:
    """Whether vLLM is installed."""
    return importlib.util.find_spec("vllm") is not None


def check_available(source: ModelSource, *, device: str, batch_invariant: bool) -> None:
    """Reject a model, a device or a mode that vLLM does not support here.

    Args:
        source: the model.
        device: "auto", "cpu" or "cuda".
        batch_invariant: whether a request's tokens must not depend on other requests.

    Raises:
        EngineUnavailableError: saying why, and what to use instead.
    """
    if source.adapter is not None:
        raise EngineUnavailableError(
            f"engine: {source.name!r} is an adapter ({source.adapter.peft_type}), which the vLLM engine does not serve; use "
            "engine=transformers, or merge it into its model"
        )
    if not installed():
        raise EngineUnavailableError("engine: vllm is not installed here; use engine=transformers")
    has_gpu = device != "cpu" and torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise EngineUnavailableError("device: there is no CUDA GPU on this machine")
    if batch_invariant:
        check_batch_invariance(torch.cuda.get_device_capability() if has_gpu else None)


def check_batch_invariance(capability: tuple[int, int] | None) -> None:
    """Reject a device that vLLM's batch-invariant kernels do not support.

    Args:
        capability: the GPU's compute capability; None for a CPU.

    Raises:
        EngineUnavailableError: naming the requirement.
    """
    if capability is None or capability < BATCH_INVARIANT_FROM:
        found = "a CPU" if capability is None else f"a GPU of compute capability {capability[0]}.{capability[1]}"
        raise EngineUnavailableError(
            f"batch_invariant: vLLM supports it on CUDA GPUs of compute capability 8.0 and later, and this is {found}; use "
            "engine=transformers"
        )
