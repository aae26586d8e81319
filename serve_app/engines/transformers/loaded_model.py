"""Loads a model into this process with transformers, and wraps it with nnsight.

`load` reads one copy of the weights, resolves the hook points and tests the model (`load_checks`) before it serves.
"""

import atexit
import logging
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from transformers import GenerationConfig, PretrainedConfig
from transformers.utils.logging import disable_progress_bar

from serve_app.capture.observer import ObservedModel, observe
from serve_app.capture.resolver import resolve_structure
from serve_app.engines.served_model import ServedModel, native_dtype
from serve_app.engines.transformers.int8_weights import quantize_weights
from serve_app.engines.transformers.load_checks import CheckedModel, check_loaded
from serve_app.models.adapters import read_model
from serve_app.models.architecture import UnsupportedModelError, check_config, read_config
from serve_app.models.description import read_tokenizer
from serve_app.models.errors import WeightsError
from serve_app.models.model_source import ModelSource
from serve_app.models.weights import quantization_of

log = logging.getLogger(__name__)

DeviceMap = str | dict[str, str | int]


@dataclass(frozen=True)
class LoadedModel(ServedModel):
    """A model that is ready to generate and to be captured; `observed` holds the weights."""

    observed: ObservedModel
    checks: CheckedModel = field(default_factory=CheckedModel, kw_only=True)

    @property
    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        return self.observed.config

    @property
    def generation_config(self) -> GenerationConfig:
        """The model's generation configuration."""
        return self.observed.generation_config

    @cached_property
    def n_embeddings(self) -> int:
        """Number of rows of the embedding; the tokenizer and the configuration may differ."""
        return int(self.observed._module.get_input_embeddings().weight.shape[0])

    @cached_property
    def head(self) -> str:
        """Path of the output head, which runs only at positions that need logits; "" if transformers does not know it."""
        head = self.observed._module.get_output_embeddings()
        return next((path for path, module in self.observed._module.named_modules() if module is head), "")


def load(
    source: ModelSource,
    dtype: str = "auto",
    device: str = "auto",
    stage: Callable[[str], None] = log.info,
    device_map: DeviceMap | None = None,
    *,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a model's weights (one copy), verify the model and its hook points with short forwards, and wrap it with nnsight.

    Args:
        source: what to load.
        dtype: "auto", or the name of a torch dtype.
        device: "auto", "cpu" or "cuda".
        stage: called with each stage of loading, for `/health`.
        device_map: spread the weights over this machine's devices, as accelerate does: "auto", "balanced", "sequential", or a
            device per module path ("cpu" and "disk" hold weights that are moved in when they are needed).
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        ConfigError: if its configuration cannot be read.
        WeightsError: if weights are missing or belong to another model (see `weights` and `models.adapters`), or cannot be
            quantized as the source says.
        ResolutionError: if its layers cannot be found, or it is not a causal decoder that the engine can run.
    """
    place = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu"))
    kind = native_dtype(place) if dtype == "auto" else getattr(torch, dtype)
    disable_progress_bar()
    stage(f"loading {source.name} ({kind}, {place})")
    config = read_config(source, trust_remote_code=trust_remote_code)
    check_config(config, trust_remote_code=trust_remote_code)
    quantization = quantization_of(config)
    if source.quantize is not None:
        _check_quantizable(source, quantization, place, device_map)
    tokenizer = read_tokenizer(source, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise UnsupportedModelError(
            f"{source.name} has a tokenizer ({type(tokenizer).__name__}) without character offsets; a fast tokenizer is needed"
        )
    options = {"revision": source.commit, "dtype": kind, "trust_remote_code": trust_remote_code}
    if device_map is None:
        module = read_model(source, **options).to(place).eval()
    else:
        # Weights on disk are read from this folder for as long as the process lives.
        folder = tempfile.mkdtemp(prefix="roentgen-offload-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        module = read_model(source, device_map=device_map, offload_folder=folder, **options).eval()
    if source.quantize is not None:
        stage(f"quantizing weights to {source.quantize}")
        quantize_weights(module, source.name)
    stage("verifying hook points")
    structure = resolve_structure(module, source.name)
    stage("checking causality, attention and batching")
    checks = check_loaded(module, structure)
    return LoadedModel(
        source,
        tokenizer,
        structure,
        place,
        kind,
        observe(module, tokenizer),
        checks=checks,
        quantization=source.quantize or quantization,
    )


def _check_quantizable(
    source: ModelSource, quantization: str | None, place: torch.device, device_map: DeviceMap | None
) -> None:
    """Reject quantizing a model that is quantized already, or weights that are not all on a CPU.

    Raises:
        WeightsError: saying why.
    """
    if quantization is not None:
        raise WeightsError(
            f"quantize: model {source.name!r} is already quantized ({quantization}); leave out quantize to serve it as it is"
        )
    if place.type != "cpu" or device_map is not None:
        raise WeightsError(f"quantize: {source.quantize} is computed on a CPU: set device=cpu, and no device_map")
