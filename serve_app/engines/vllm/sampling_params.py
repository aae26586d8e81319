"""Converts a job's sampling settings for vLLM, and vLLM's log-probabilities back. vLLM itself chooses tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from serve_app.engines.protocol import GenerationJob, TokenScore
from serve_app.engines.vllm.worker_messages import CHOSEN_ONLY, EXTRA_ARGS_KEY, UNSCORED, CaptureRequest, pack

SEEDS = 1 << 63
"""Upper limit of seeds: vLLM's generators accept no larger ones."""


def sampling_params(
    job: GenerationJob, stop_token_ids: frozenset[int], request: CaptureRequest | None
) -> SamplingParams:
    """Return vLLM's sampling parameters for a job.

    vLLM does not detokenize: text and stop strings are handled by the same code for both engines, so tokens are requested as
    they are generated whenever a caller streams.

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
        top_k=s.top_k if s.top_p > 0 else 1,  # the smallest set with a probability of 0 is the most likely token
        min_p=s.min_p,
        seed=None if s.seed is None else s.seed % SEEDS,
        max_tokens=max(s.max_tokens, 1),  # vLLM generates at least one token, which is then discarded
        min_tokens=min(s.min_tokens, max(s.max_tokens, 1)),
        stop_token_ids=sorted(stop_token_ids),
        ignore_eos=True,  # stop_token_ids contains them
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
    # vLLM would tokenize words itself; the tokens of bad words are the same for both engines.
    params._bad_words_token_ids = [list(word) for word in s.bad_words] or None
    return params


def _read_along(job: GenerationJob, stop_token_ids: frozenset[int]) -> bool:
    """Whether tokens are needed as they are generated: to be streamed, or because vLLM cannot tell where the job ends."""
    return job.stream or bool(job.sampling.stop) or (job.stopping is not None and not stop_token_ids)


def _logprobs(job: GenerationJob) -> int:
    if not job.score_tokens:
        return UNSCORED
    if named := job.sampling.logprob_token_ids:
        return len(named)  # vLLM requires this number
    top = job.sampling.top_logprobs
    return max(top, CHOSEN_ONLY + 1) if top else CHOSEN_ONLY


def token_score(token: int, found: Mapping[int, Any], top: int, named: Sequence[int] = ()) -> TokenScore:
    """Return a token's score.

    Args:
        token: the token.
        found: vLLM's log-probabilities at its position, by token: its own, and those of the most likely or the named tokens.
        top: number of most likely tokens to report.
        named: tokens to report instead of the most likely ones.
    """
    if named:
        reported = dict.fromkeys((token, *named))
        return TokenScore(found[token].logprob, tuple((other, found[other].logprob) for other in reported))
    best = sorted((one.rank, other, one.logprob) for other, one in found.items() if one.rank is not None)[:top]
    top_tokens = tuple((other, logprob) for _, other, logprob in best)
    return TokenScore(found[token].logprob, top_tokens, found[token].rank)
