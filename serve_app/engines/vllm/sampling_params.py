"""A job's sampling in vLLM's words, and vLLM's log-probabilities in ours. Choosing tokens is vLLM's own."""

from collections.abc import Mapping, Sequence
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from serve_app.engines.protocol import GenerationJob, TokenScore
from serve_app.engines.vllm.worker_messages import CHOSEN_ONLY, EXTRA_ARGS_KEY, UNSCORED, CaptureRequest, pack

SEEDS = 1 << 63
"""vLLM's generators take no larger ones."""


def sampling_params(
    job: GenerationJob, stop_token_ids: frozenset[int], request: CaptureRequest | None
) -> SamplingParams:
    """Spell a job for vLLM.

    vLLM detokenizes nothing: text, and the stop strings in it, are the same code for both engines, so the tokens are asked for
    as they come wherever somebody reads along.

    Args:
        job: what to generate.
        stop_token_ids: all tokens that end it.
        request: what its workers capture, steer and score.
    """
    s = job.sampling
    follow = job.constraint.grammar if job.constraint is not None else None
    params = SamplingParams(
        temperature=s.temperature,
        top_p=s.top_p if s.top_p > 0 else 1.0,
        top_k=s.top_k if s.top_p > 0 else 1,  # the smallest set with no probability at all is the most likely token
        min_p=s.min_p,
        seed=None if s.seed is None else s.seed % SEEDS,
        max_tokens=max(s.max_tokens, 1),  # reading a prompt takes a token with it, which is thrown away
        min_tokens=min(s.min_tokens, max(s.max_tokens, 1)),
        stop_token_ids=sorted(stop_token_ids),
        ignore_eos=True,  # those are all of them
        allowed_token_ids=None if s.allowed_token_ids is None else list(s.allowed_token_ids),
        presence_penalty=s.presence_penalty,
        frequency_penalty=s.frequency_penalty,
        repetition_penalty=s.repetition_penalty,
        logit_bias=dict(s.logit_bias) or None,
        logprobs=_logprobs(job),
        logprob_token_ids=list(s.logprob_token_ids) or None if job.score_tokens else None,
        prompt_logprobs=max(s.top_logprobs, s.prompt_logprobs or 0) if job.score_prompt else None,
        structured_outputs=StructuredOutputsParams(grammar=follow) if follow is not None else None,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA if _read_along(job, stop_token_ids) else RequestOutputKind.FINAL_ONLY,
        extra_args={EXTRA_ARGS_KEY: pack(request)} if request is not None else None,
    )
    # vLLM would make tokens of words; which tokens a word has is the same code for both engines.
    params._bad_words_token_ids = [list(word) for word in s.bad_words] or None
    return params


def _read_along(job: GenerationJob, stop_token_ids: frozenset[int]) -> bool:
    """Whether tokens are wanted as they come: to be told, or because vLLM does not see by itself where the job ends."""
    return job.stream or bool(job.sampling.stop) or (job.stopping is not None and not stop_token_ids)


def _logprobs(job: GenerationJob) -> int:
    if not job.score_tokens:
        return UNSCORED
    if named := job.sampling.logprob_token_ids:
        return len(named)  # as vLLM insists
    top = job.sampling.top_logprobs
    return max(top, CHOSEN_ONLY + 1) if top else CHOSEN_ONLY


def token_score(token: int, found: Mapping[int, Any], top: int, named: Sequence[int] = ()) -> TokenScore:
    """Return how likely a token was.

    Args:
        token: which.
        found: vLLM's log-probabilities at its position, by token: its own, and the most likely ones or the named ones.
        top: how many of the most likely to report.
        named: what to report in place of the most likely ones.
    """
    if named:
        reported = dict.fromkeys((token, *named))
        return TokenScore(found[token].logprob, tuple((other, found[other].logprob) for other in reported))
    best = sorted((one.rank, other, one.logprob) for other, one in found.items() if one.rank is not None)[:top]
    top_tokens = tuple((other, logprob) for _, other, logprob in best)
    return TokenScore(found[token].logprob, top_tokens, found[token].rank)
