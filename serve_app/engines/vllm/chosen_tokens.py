"""The log-probabilities of the tokens that were chosen, without ranking the vocabulary for them.

A stored rollout has the log-probability of each of its tokens; few requests ask for those of other tokens. vLLM makes no
difference: it normalizes, sorts and ranks the whole vocabulary for every row. With 16 rows of a small model on a CPU that takes
a fifth of a step. For one token a row, normalizing is enough, and where nobody asks at all, only whether there is a number.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from serve_app.engines.vllm.worker_messages import CHOSEN_ONLY

ROWS = 16
"""Normalized at once: their float32 copies are a few MB, which on a CPU stay in its cache."""


class ChosenTokenSampler(Sampler):
    """vLLM's sampler. A batch in which somebody asks for more than chosen tokens is vLLM's own as a whole."""

    def forward(self, logits: Tensor, sampling_metadata: SamplingMetadata, *args: Any, **kwargs: Any) -> SamplerOutput:
        """Choose tokens, and say how likely they were by the model's own logits if anybody asks, or if a logit is no number."""
        asked = sampling_metadata.max_num_logprobs
        more = asked is None or asked > CHOSEN_ONLY or sampling_metadata.logprob_token_ids
        if more or self.logprobs_mode != "raw_logprobs" or args or kwargs.get("logprobs_mode_override"):
            return super().forward(logits, sampling_metadata, *args, **kwargs)
        scored = asked == CHOSEN_ONLY or not bool(logits.amax(-1).isfinite().all())
        # Penalties and biases are written into float32 logits; of others vLLM makes a copy itself.
        raw = logits.clone() if scored and logits.dtype == torch.float32 else logits
        output = super().forward(logits, replace(sampling_metadata, max_num_logprobs=None), **kwargs)
        if not scored:
            return output
        chosen = output.sampled_token_ids
        output.logprobs_tensors = LogprobsTensors(
            chosen, log_probabilities(raw, chosen), torch.zeros_like(chosen[:, 0])
        )
        return output


def log_probabilities(
    logits: Float[Tensor, "rows vocabulary"], chosen: Int[Tensor, "rows 1"]
) -> Float[Tensor, "rows 1"]:
    """Return the log-probability of one token per row, in float32."""
    parts = zip(logits.split(ROWS), chosen.long().split(ROWS), strict=True)
    return torch.cat([rows.float().log_softmax(-1).gather(-1, tokens) for rows, tokens in parts])


class ScoresChosenTokens:
    """Mixed into a vLLM worker class: its model runner has this sampler."""

    model_runner: Any

    def init_device(self) -> None:
        """Make the device ready, and have its model runner score what it chooses."""
        super().init_device()  # type: ignore[misc]
        sampler = self.model_runner.sampler
        if type(sampler) is Sampler:
            sampler.__class__ = ChosenTokenSampler
