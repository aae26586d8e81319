"""Parameters that chat completions and completions share: sampling, streaming, activations, probes and steering.

Every OpenAI parameter declared here has an effect, except those whose only accepted value describes what happens anyway
(`neutral`). Every undeclared parameter is refused by name, because silently ignoring one would make results wrong. `top_k`,
`min_tokens`, `repetition_penalty` and `stop_token_ids` are not OpenAI's; they have vLLM's names, as those of `vllm_params` do.
"""

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from roentgen.contract import MAX_INT32, SERVER_LABELS, ActivationRequest, Float, Int, Temperature, TopP, no_booleans
from serve_app.engines.protocol import Sampling
from serve_app.openai_api.collect_activations import CollectActivations
from serve_app.openai_api.errors import enumerated
from serve_app.openai_api.neutral import NeutralParams
from serve_app.openai_api.probe_params import (
    MAX_ADDITIONS,
    MAX_PROBES,
    ProbeRequest,
    SteeringRequest,
)
from serve_app.openai_api.vllm_params import MAX_TOP_LOGPROBS, VllmParams

__all__ = ["MAX_TOP_LOGPROBS", "GenerationParams", "StreamOptions"]

MAX_CHOICES = 128


def _stop_list(stop: Any) -> Any:
    return [] if stop is None else [stop] if isinstance(stop, str) else stop


def _different_tokens(biases: Any) -> Any:
    """Refuse keys that are not token ids, and two keys for the same token, of which one bias would be dropped."""
    if isinstance(biases, dict):
        named = [re.fullmatch(r"\s*\+?([0-9]{1,4300})\s*", str(token)) for token in biases]
        if wrong := [token for token, found in zip(biases, named, strict=True) if found is None]:
            raise ValueError(f"keys must be token ids (integers from 0); {enumerated(map(repr, wrong))} is not allowed")
        if len({int(found[1]) for found in named if found}) < len(biases):
            raise ValueError("two keys are the same token id")
    return biases


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False
    """Accepted without effect; OpenAI pads chunks so that their sizes reveal nothing."""
    continuous_usage_stats: bool = False
    """With `include_usage`, every chunk contains the token counts so far."""


class GenerationParams(NeutralParams, VllmParams):
    """The fields that the bodies of both routes share (docs/http.md)."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: Int = Field(default=0, ge=-1)
    min_tokens: Int = Field(default=0, ge=0)
    seed: Annotated[Int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16), BeforeValidator(_stop_list)] = (
        Field(default=[])
    )
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], BeforeValidator(no_booleans), Field(max_length=64)] = (
        Field(default=[])
    )
    presence_penalty: Float = Field(default=0, ge=-2, le=2)
    frequency_penalty: Float = Field(default=0, ge=-2, le=2)
    repetition_penalty: Float = Field(default=1, gt=0, le=10)
    logit_bias: Annotated[
        dict[Annotated[int, Field(ge=0)], Annotated[Float, Field(ge=-100, le=100)]], BeforeValidator(_different_tokens)
    ] = Field(default={})
    n: Int = Field(default=1, ge=1, le=MAX_CHOICES)
    activations: ActivationRequest | None = None
    collect_activations: CollectActivations | None = None
    probes: list[ProbeRequest] = Field(default=[], max_length=MAX_PROBES)
    steering: list[SteeringRequest] = Field(default=[], max_length=MAX_ADDITIONS)

    @model_validator(mode="after")
    def _agree(self) -> "GenerationParams":
        if self.activations is not None and self.collect_activations is not None:
            raise ValueError("activations: collect_activations is another name for it; send only one of them")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: allowed only with stream: true")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs: allowed only with stream: false")
        names = [probe if isinstance(probe, str) else probe.name for probe in self.probes]
        if len(set(names)) < len(names):
            raise ValueError("probes: two probes have the same name")
        asked = self.capture
        for name in SERVER_LABELS.keys() & (asked.labels if asked is not None else ()):
            raise ValueError(
                f"activations.labels: {name!r} is reserved; the server sets it from the request's {SERVER_LABELS[name]}"
            )
        if asked is not None and asked.key is not None and self.n > 1:
            raise ValueError("activations.key: a key identifies one rollout, but n > 1 makes several; send n requests")
        return self

    @property
    def capture(self) -> ActivationRequest | None:
        """The request for activations, from `activations` or `collect_activations`."""
        return self.collect_activations.request() if self.collect_activations else self.activations

    @property
    def counts_usage(self) -> bool:
        """Whether a stream ends with token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def counts_usage_in_chunks(self) -> bool:
        """Whether every chunk of a stream contains the token counts so far."""
        return self.counts_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def returns_token_ids(self) -> bool:
        """Whether the reply contains token ids: if requested, or if it contains rows or scores, which are one per token."""
        if self.return_token_ids is not None:
            return self.return_token_ids
        return bool(self.probes) or (self.capture is not None and self.capture.delivery != "reference")

    def sampling(
        self, max_tokens: int, choice: int, top_logprobs: int, bad_words: tuple[tuple[int, ...], ...] = ()
    ) -> Sampling:
        """Return one choice's sampling parameters; each choice of a seeded request has its own random stream.

        Args:
            max_tokens: maximum number of tokens to generate.
            choice: number of the choice, from 0.
            top_logprobs: number of alternatives to report per token.
            bad_words: the token ids of `bad_words`.
        """
        return Sampling(
            max_tokens=max_tokens,
            min_tokens=min(self.min_tokens, MAX_INT32),
            temperature=self.temperature,
            top_k=min(max(self.top_k, 0), MAX_INT32),  # no vocabulary is larger
            top_p=self.top_p,
            min_p=self.min_p,
            seed=None if self.seed is None else self.seed % 2**64 + (choice << 64),
            stop=tuple(self.stop),
            stop_token_ids=frozenset(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            include_stop=self.include_stop_str_in_output,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias,
            allowed_token_ids=None if self.allowed_token_ids is None else tuple(self.allowed_token_ids),
            bad_words=bad_words,
            top_logprobs=0 if self.logprob_token_ids else top_logprobs,
            prompt_logprobs=self.prompt_logprobs,
            logprob_token_ids=tuple(self.logprob_token_ids),
        )
