"""Describes a model to those who serve it, wherever its weights are.

Rendering, planning and the reply need a model's tokenizer, limits and hook points, but not its weights. Every engine provides
them as a `ServedModel`. Engines with the weights in their own process derive from it (`transformers.loaded_model`).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from roentgen.stop_rule import ReasoningTokens
from serve_app.capture.structure import ModelStructure
from serve_app.engines.batching import Batching, LoadReport
from serve_app.engines.markers import MARKERS, THINK_END, THINK_START
from serve_app.models.context import context_length
from serve_app.models.model_source import ModelSource

if TYPE_CHECKING:
    from serve_app.engines.constraints import Constraints


@dataclass(frozen=True)
class ServedModel(ABC):
    """A model as its server sees it, wherever its weights are."""

    source: ModelSource
    """Where it was loaded from."""
    tokenizer: PreTrainedTokenizerBase
    """Its tokenizer."""
    structure: ModelStructure
    """Its hook points."""
    device: torch.device
    """Device that it computes on."""
    dtype: torch.dtype
    """Dtype that it computes in."""
    quantization: str | None = field(default=None, kw_only=True)
    """How its weights are quantized: "int8" if they were quantized when loaded, or the method that its own configuration
    names; None if they are not."""
    checks: LoadReport = field(default_factory=LoadReport, kw_only=True)
    """Results of the checks when it was loaded."""

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
        """The model's generation configuration."""

    @cached_property
    def constraints(self) -> "Constraints":
        """Constrains generations to grammars."""
        from serve_app.engines.constraints import Constraints  # free text needs no llguidance

        return Constraints(self.tokenizer, self.vocab_size, self.eos_token_ids)

    @cached_property
    def markers(self) -> dict[int, str]:
        """Special tokens that are part of the text, because replies are parsed by them (`openai_api.reply`)."""
        special = self.tokenizer.added_tokens_decoder.items()
        return {token_id: token.content for token_id, token in special if token.special and token.content in MARKERS}

    @cached_property
    def reasoning_tokens(self) -> ReasoningTokens | None:
        """Tokens that mark the model's reasoning; None if it has none."""
        vocabulary = self.tokenizer.get_vocab()
        start, end = vocabulary.get(THINK_START), vocabulary.get(THINK_END)
        return None if start is None or end is None else ReasoningTokens(start, end)

    @property
    def context_length(self) -> int | None:
        """Largest number of tokens of a sequence; None if the model has no limit."""
        return context_length(self.config, self.tokenizer)

    @property
    def n_embeddings(self) -> int:
        """Number of token ids that the model accepts."""
        return self.vocab_size

    def unknown_token(self, token_ids: Sequence[int]) -> int | None:
        """Return the first of these tokens that the model does not accept; None if it accepts all."""
        known = range(self.n_embeddings)
        return next((token for token in token_ids if token not in known), None)

    @property
    def vocab_size(self) -> int:
        """Number of the model's logits."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """End-of-text tokens."""
        ids = self.generation_config.eos_token_id
        if ids is None:
            ids = self.tokenizer.eos_token_id
        return frozenset([ids] if isinstance(ids, int) else ids or [])


def native_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 if the device supports it natively, else float32: emulated bfloat16 is several times slower."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bf16 else torch.float32
