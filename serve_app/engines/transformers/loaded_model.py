"""A model whose weights are in this process, loaded with transformers and wrapped with nnsight.

`load` reads one copy of the weights, resolves the hook points and tries the model (`load_checks`) before it serves.
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
    """A model ready to generate and to be observed; `observed` holds the weights."""

    observed: ObservedModel
    checks: CheckedModel = field(default_factory=CheckedModel, kw_only=True)

    @property
    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        return self.observed.config

    @property
    def generation_config(self) -> GenerationConfig:
        """How the model says that it generates."""
        return self.observed.generation_config

    @cached_property
    def n_embeddings(self) -> int:
        """How many rows the embedding has; neither the tokenizer nor the configuration has to agree."""
        return int(self.observed._module.get_input_embeddings().weight.shape[0])

    @cached_property
    def head(self) -> str:
        """Path of the output head, which is run only where logits are wanted; "" if transformers does not say."""
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
    """Load a model's weights (one copy), check them and their hook points by forwards, and wrap them with nnsight.

    Args:
        source: what to load.
        dtype: "auto", or a torch dtype's name.
        device: "auto", "cpu" or "cuda".
        stage: told what is being done, for `/health`.
        device_map: spread the weights over this machine's devices, as accelerate does: "auto", "balanced", "sequential", or
            a device per module path ("cpu" and "disk" hold weights that are brought in when they are needed).
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        ConfigError: if its configuration cannot be read.
        WeightsError: if the weights are not all there, or not the model's; see `weights` and `models.adapters`. Or if they
            cannot be quantized as the source says.
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
            f"{source.name} has a tokenizer ({type(tokenizer).__name__}) that cannot say which characters a token covers"
        )
    options = {"revision": source.commit, "dtype": kind, "trust_remote_code": trust_remote_code}
    if device_map is None:
        module = read_model(source, **options).to(place).eval()
    else:
        # Weights on disk are read from here for as long as the process lives.
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
    """Refuse to quantize what comes quantized, and weights that are not all on a CPU.

    Raises:
        WeightsError: saying so.
    """
    if quantization is not None:
        raise WeightsError(
            f"quantize: model {source.name!r} comes quantized ({quantization}); leave quantize out, and it is served so"
        )
    if place.type != "cpu" or device_map is not None:
        raise WeightsError(f"quantize: {source.quantize} is computed on a CPU: set device=cpu, and no device_map")
