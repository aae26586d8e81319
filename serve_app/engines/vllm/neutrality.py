"""Checks that vLLM gives a short request the same values alone and beside a long one.

vLLM packs its batches, so there is no padding to read. A model's own code or a kernel could still depend on other requests. To
find out, the log-probabilities of a request that joins others are compared with those of the same request alone.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Protocol

import torch

from serve_app.engines.batching import Batching
from serve_app.engines.vllm.worker_messages import CHOSEN_ONLY

SHORT, LONG, NEW = 9, 300, 4
"""Tokens of the two prompts, and of each completion."""

LARGEST_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}
"""Largest mean difference of a log-probability that rounding explains: batches of other shapes run other kernels."""


class Generating(Protocol):
    """A client of vLLM's engine."""

    def generate(self, prompt: Any, sampling_params: Any, request_id: str) -> AsyncIterator[Any]:
        """Yield a request's outputs."""


async def check_batching(client: Generating, vocab_size: int, context: int, dtype: torch.dtype) -> Batching:
    """Run a request alone and beside a longer one; returns which requests may share a forward.

    Args:
        client: vLLM's client.
        vocab_size: number of tokens that prompts are drawn from.
        context: most tokens of a sequence.
        dtype: dtype that the model computes in.
    """
    drawn = torch.randint(0, vocab_size, (SHORT + LONG,), generator=torch.Generator().manual_seed(0)).tolist()
    short, long = drawn[:SHORT], drawn[SHORT:][: max(1, context - NEW)]
    alone = await _logprobs(client, short, "alone")
    beside, _ = await asyncio.gather(_logprobs(client, short, "short"), _logprobs(client, long, "long"))
    error = sum(abs(a - b) for a, b in zip(alone, beside, strict=True)) / len(alone)
    if error <= LARGEST_ERROR.get(dtype, 0.2):
        return Batching()
    return Batching("alone", reason=f"beside a longer request, log-probabilities differ by {error:.2g} on average")


async def _logprobs(client: Generating, prompt: list[int], name: str) -> list[float]:
    """Return the log-probabilities of a prompt's tokens from the second on, and of the first generated token."""
    from vllm import SamplingParams, TokensPrompt

    params = SamplingParams(
        max_tokens=NEW, temperature=0, ignore_eos=True, detokenize=False, logprobs=CHOSEN_ONLY, prompt_logprobs=0
    )
    outputs = client.generate(TokensPrompt(prompt_token_ids=prompt), params, f"neutrality-{name}")
    *_, output = [output async for output in outputs]
    read = [found[token].logprob for token, found in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]
    # Rounding may change which token follows, and everything after it, but not that token's log-probability.
    first = next(iter(output.outputs[0].logprobs[0].values())).logprob
    return [*read, first]
