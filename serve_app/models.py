"""What serving needs to know of a model, and loading one with transformers: one copy of the weights, wrapped with nnsight.

Rendering, planning and the reply need a model's tokenizer, limits and hook points, and no weights. That is `ServedModel`,
which every engine gives; `LoadedModel` is one whose weights are in this process.
"""

import atexit
import logging
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from serve_app.adapters import read_model
from serve_app.capture.observer import ObservedModel, observe
from serve_app.capture.resolver import resolve_structure
from serve_app.capture.structure import ModelStructure
from serve_app.context import context_length
from serve_app.engines.batching import Batching
from serve_app.engines.load_checks import LoadReport, check_config, check_loaded
from serve_app.engines.markers import MARKERS
from serve_app.engines.model_cache import UnsupportedModelError
from serve_app.sources import ModelSource

if TYPE_CHECKING:
    from serve_app.engines.constraints import Constraints

log = logging.getLogger(__name__)

DeviceMap = str | dict[str, str | int]


@dataclass(frozen=True)
class ServedModel(ABC):
    """A model as whoever serves it sees it, wherever its weights are.

    Attributes:
        source: where it came from.
        tokenizer: its own.
        structure: its hook points.
        device: where it computes.
        dtype: what it computes in.
        checks: what was found when it was loaded.
    """

    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    structure: ModelStructure
    device: torch.device
    dtype: torch.dtype
    checks: LoadReport = field(default_factory=LoadReport, kw_only=True)

    @property
    def batching(self) -> Batching:
        """Which requests may share a forward."""
        return self.checks.batching

    @property
    @abstractmethod
    def config(self) -> PretrainedConfig:
        """The model's configuration."""

    @property
    @abstractmethod
    def generation_config(self) -> GenerationConfig:
        """How the model says that it generates."""

    @cached_property
    def constraints(self) -> "Constraints":
        """Makes generations follow grammars."""
        from serve_app.engines.constraints import Constraints  # free text needs no llguidance

        return Constraints(self.tokenizer, self.vocab_size, self.eos_token_ids)

    @cached_property
    def markers(self) -> dict[int, str]:
        """Special tokens that are text, because replies are taken apart by them (`openai_api.reply`)."""
        special = self.tokenizer.added_tokens_decoder.items()
        return {token_id: token.content for token_id, token in special if token.special and token.content in MARKERS}

    @property
    def context_length(self) -> int | None:
        """The most tokens a sequence may have; None if the model sets no limit."""
        return context_length(self.config, self.tokenizer)

    @property
    def n_embeddings(self) -> int:
        """How many tokens the model can be given."""
        return self.vocab_size

    def unknown_token(self, token_ids: Sequence[int]) -> int | None:
        """Return the first of these tokens that the model cannot be given, None if it can be given all."""
        known = range(self.n_embeddings)
        return next((token for token in token_ids if token not in known), None)

    @property
    def vocab_size(self) -> int:
        """How many logits the model has."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a generation."""
        ids = self.generation_config.eos_token_id
        if ids is None:
            ids = self.tokenizer.eos_token_id
        return frozenset([ids] if isinstance(ids, int) else ids or [])


@dataclass(frozen=True)
class LoadedModel(ServedModel):
    """A model ready to generate and to be observed; `observed` holds the only copy of the weights."""

    observed: ObservedModel

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
        WeightsError: if the weights are not all there, or not the model's; see `weights` and `adapters`.
        ResolutionError: if its layers cannot be found, or it is not a causal decoder that the engine can run.
    """
    place = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu"))
    kind = native_dtype(place) if dtype == "auto" else getattr(torch, dtype)
    disable_progress_bar()
    stage(f"loading {source.name} ({kind}, {place})")
    config = AutoConfig.from_pretrained(source.path, revision=source.commit, trust_remote_code=trust_remote_code)
    check_config(config, trust_remote_code=trust_remote_code)
    words, commit = source.tokenizer_at
    tokenizer = AutoTokenizer.from_pretrained(words, revision=commit, trust_remote_code=trust_remote_code)
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
    stage("verifying hook points")
    structure = resolve_structure(module, source.name)
    stage("checking causality, attention and batching")
    checks = check_loaded(module, structure)
    return LoadedModel(source, tokenizer, structure, place, kind, observe(module, tokenizer), checks=checks)


def native_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the device computes in it, else float32: emulated bfloat16 is several times slower."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bf16 else torch.float32
