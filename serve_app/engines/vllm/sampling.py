"""A job's sampling in vLLM's words, and vLLM's log-probabilities in ours. Choosing tokens is vLLM's own."""

from collections.abc import Mapping
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from serve_app.engines.protocol import GenerationJob, TokenScore
from serve_app.engines.vllm.orders import EXTRA, Order, pack

SEEDS = 1 << 63
"""vLLM's generators take no larger ones."""


def sampling_params(job: GenerationJob, ends: frozenset[int], order: Order | None) -> SamplingParams:
    """Spell a job for vLLM.

    vLLM detokenizes nothing: text, and the stop strings in it, are the same code for both engines, so the tokens are asked for
    as they come wherever somebody reads along.

    Args:
        job: what to generate.
        ends: tokens that end it.
        order: what its workers do beside.
    """
    s = job.sampling
    follow = job.constraint.grammar if job.constraint is not None else None
    return SamplingParams(
        temperature=s.temperature,
        top_p=s.top_p if s.top_p > 0 else 1.0,
        top_k=s.top_k if s.top_p > 0 else 1,  # the smallest set with no probability at all is the most likely token
        seed=None if s.seed is None else s.seed % SEEDS,
        max_tokens=max(s.max_tokens, 1),  # reading a prompt takes a token with it, which is thrown away
        min_tokens=min(s.min_tokens, max(s.max_tokens, 1)),
        stop_token_ids=sorted(ends),
        ignore_eos=True,  # those are all of them
        presence_penalty=s.presence_penalty,
        frequency_penalty=s.frequency_penalty,
        repetition_penalty=s.repetition_penalty,
        logit_bias=dict(s.logit_bias) or None,
        logprobs=s.top_logprobs,
        prompt_logprobs=s.top_logprobs if job.score_prompt else None,
        structured_outputs=StructuredOutputsParams(grammar=follow) if follow is not None else None,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA if job.stream or s.stop else RequestOutputKind.FINAL_ONLY,
        extra_args={EXTRA: pack(order)} if order is not None else None,
    )


def token_score(token: int, found: Mapping[int, Any], top: int) -> TokenScore:
    """Return how likely a token was.

    Args:
        token: which.
        found: vLLM's log-probabilities at its position, by token: its own and the most likely ones.
        top: how many of those to report.
    """
    best = sorted((one.rank, other, one.logprob) for other, one in found.items() if one.rank is not None)[:top]
    return TokenScore(found[token].logprob, tuple((other, logprob) for _, other, logprob in best))
