"""The log-probabilities of the tokens that were chosen, without ranking the vocabulary for them.

Every completion has the log-probability of each of its tokens; few requests ask for those of other tokens. vLLM makes no
difference: it normalizes, sorts and ranks the whole vocabulary for every row. With 16 rows of a small model on a CPU that takes
a fifth of a step. For one token a row, its logit and the logarithm of the sum of all exponentials are enough.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler


class ChosenTokenSampler(Sampler):
    """vLLM's sampler. A batch in which somebody asks for more than chosen tokens is vLLM's own as a whole."""

    def forward(self, logits: Tensor, sampling_metadata: SamplingMetadata, *args: Any, **kwargs: Any) -> SamplerOutput:
        """Choose tokens, and say how likely they were by the model's own logits."""
        more = sampling_metadata.max_num_logprobs != 0 or sampling_metadata.logprob_token_ids
        if more or self.logprobs_mode != "raw_logprobs" or args or kwargs.get("logprobs_mode_override"):
            return super().forward(logits, sampling_metadata, *args, **kwargs)
        normalizer = log_normalizer(logits)
        # Penalties and biases are written into float32 logits; of others vLLM makes a copy itself.
        raw = logits.clone() if logits.dtype == torch.float32 else logits
        output = super().forward(logits, replace(sampling_metadata, max_num_logprobs=None), **kwargs)
        chosen = output.sampled_token_ids
        logprobs = raw.gather(-1, chosen.long()).float() - normalizer.unsqueeze(-1)
        output.logprobs_tensors = LogprobsTensors(chosen, logprobs, torch.zeros_like(chosen[:, 0]))
        return output


def log_normalizer(logits: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, "rows"]:
    """Return the logarithm of the sum of each row's exponentials, in float32."""
    # One kernel for every number of rows, so that nothing is compiled while requests run.
    torch._dynamo.decorators.mark_unbacked(logits, 0)
    return _normalizer(logits)


@torch.compile
def _normalizer(logits: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, "rows"]:
    return torch.logsumexp(logits.float(), dim=-1)


class ScoresChosenTokens:
    """Mixed into a vLLM worker class: its model runner has this sampler."""

    model_runner: Any

    def init_device(self) -> None:
        """Make the device ready, and have its model runner score what it chooses."""
        super().init_device()  # type: ignore[misc]
        sampler = self.model_runner.sampler
        if type(sampler) is Sampler:
            sampler.__class__ = ChosenTokenSampler
