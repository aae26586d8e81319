"""What serving needs to know of a model, and loading one with transformers: one copy of the weights, wrapped with nnsight.

Rendering, planning and the reply need a model's tokenizer, limits and hook points, and no weights. That is `ServedModel`,
which every engine gives; `LoadedModel` is one whose weights are in this process.
"""

import atexit
import logging
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import (
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
from serve_app.engines.attention import use_grouped_attention
from serve_app.engines.constraints import Constraints
from serve_app.openai_api.reply import MARKERS
from serve_app.sources import ModelSource

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
    """

    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    structure: ModelStructure
    device: torch.device
    dtype: torch.dtype

    @property
    @abstractmethod
    def config(self) -> PretrainedConfig:
        """The model's configuration."""

    @property
    @abstractmethod
    def generation_config(self) -> GenerationConfig:
        """How the model says that it generates."""

    @cached_property
    def constraints(self) -> Constraints:
        """Makes generations follow grammars."""
        return Constraints(self.tokenizer, self.vocab_size, self.eos_token_ids)

    @cached_property
    def markers(self) -> dict[int, str]:
        """Special tokens that are text, because replies are taken apart by them (`openai_api.reply`)."""
        special = self.tokenizer.added_tokens_decoder.items()
        return {token_id: token.content for token_id, token in special if token.special and token.content in MARKERS}

    @property
    def context_length(self) -> int:
        """The most tokens a sequence may have."""
        return int(self.config.get_text_config().max_position_embeddings)

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
    """Load a model's weights (one copy), verify its hook points by a forward, and wrap it with nnsight.

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
        ResolutionError: if the model's layers cannot be found.
    """
    place = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu"))
    kind = native_dtype(place) if dtype == "auto" else getattr(torch, dtype)
    disable_progress_bar()
    stage(f"loading {source.name} ({kind}, {place})")
    words, commit = source.tokenizer_at
    tokenizer = AutoTokenizer.from_pretrained(words, revision=commit, trust_remote_code=trust_remote_code)
    options = {"revision": source.commit, "dtype": kind, "trust_remote_code": trust_remote_code}
    if device_map is None:
        module = read_model(source, **options).to(place).eval()
    else:
        # Weights on disk are read from here for as long as the process lives.
        folder = tempfile.mkdtemp(prefix="roentgen-offload-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        module = read_model(source, device_map=device_map, offload_folder=folder, **options).eval()
    use_grouped_attention(module)
    stage("verifying hook points")
    structure = resolve_structure(module, source.name)
    return LoadedModel(source, tokenizer, structure, place, kind, observe(module, tokenizer))


def native_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the device computes in it, else float32: emulated bfloat16 is several times slower."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bf16 else torch.float32
