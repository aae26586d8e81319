"""Computes the log-probabilities of the chosen tokens without ranking the vocabulary.

A stored rollout has the log-probability of each of its tokens; few requests ask for those of other tokens. vLLM does not
distinguish the two: it normalizes, sorts and ranks the whole vocabulary for every row. With 16 rows of a small model on a CPU
that takes a fifth of a step. For one token per row, normalizing is enough. If no request asks for log-probabilities, only NaN
logits must be detected.
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
"""Number of rows that are normalized at once: their float32 copies take a few MB, which stay in a CPU's cache."""


class ChosenTokenSampler(Sampler):
    """vLLM's sampler. A batch in which a request asks for more than chosen tokens is left to vLLM as a whole."""

    def forward(self, logits: Tensor, sampling_metadata: SamplingMetadata, *args: Any, **kwargs: Any) -> SamplerOutput:
        """Choose tokens, with their log-probabilities under the model's own logits if a request asks or a logit is NaN."""
        asked = sampling_metadata.max_num_logprobs
        more = asked is None or asked > CHOSEN_ONLY or sampling_metadata.logprob_token_ids
        if more or self.logprobs_mode != "raw_logprobs" or args or kwargs.get("logprobs_mode_override"):
            return super().forward(logits, sampling_metadata, *args, **kwargs)
        scored = asked == CHOSEN_ONLY or not bool(logits.amax(-1).isfinite().all())
        # vLLM writes penalties and biases into float32 logits in place; of other dtypes it makes a copy itself.
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
    """Mixin for a vLLM worker class: its model runner uses `ChosenTokenSampler`."""

    model_runner: Any

    def init_device(self) -> None:
        """Initialize the device, and replace the model runner's sampler."""
        super().init_device()  # type: ignore[misc]
        sampler = self.model_runner.sampler
        if type(sampler) is Sampler:
            sampler.__class__ = ChosenTokenSampler
