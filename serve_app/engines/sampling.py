"""Chooses the next token of each row of a batch, by each row's own settings and its own random stream.

Everything that is the same for all rows runs once for the batch: the argmax of the greedy ones, the softmax, cumulative sum
and search of the sampled ones, on the model's device. A request's only randomness is one uniform number per token, drawn
from a generator of its own, so that a seed means the same whatever runs beside it.
"""

from collections import Counter

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from serve_app.engines.protocol import Constraint, ConstraintError, Sampling, TokenScore

FEW = 1024
"""Tokens in which top_k and top_p are looked for first; sorting a whole vocabulary costs much more."""


class Sampler:
    """One request's settings, its random stream, and what its penalties have to remember.

    Attributes:
        sampling: the settings.
        failure: why its constraint can no longer be followed; it must fail then.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt_ids: list[int],
        end_token_ids: frozenset[int],
        constraint: Constraint | None = None,
    ) -> None:
        """Start a request's stream.

        Args:
            sampling: its settings.
            prompt_ids: its prompt.
            end_token_ids: tokens that end it, `sampling.stop_token_ids` included.
            constraint: the grammar it follows.
        """
        self.sampling = sampling
        self.failure: ConstraintError | None = None
        self._constraint = constraint
        self._random = np.random.default_rng(None if sampling.seed is None else sampling.seed % 2**128)
        self._ends = sorted(end_token_ids)
        self._counts: Counter[int] = Counter()
        self._prompt = set(prompt_ids) if sampling.repetition_penalty != 1 else set()

    def uniform(self) -> float:
        """Draw the stream's next number, in [0, 1)."""
        return float(self._random.random())

    def saw(self, token: int) -> None:
        """Remember a generated token."""
        self._counts[token] += 1
        if self._constraint is not None and self.failure is None:
            try:
                self._constraint.accept(token)
            except ConstraintError as error:
                self.failure = error

    @property
    def adjusts(self) -> bool:
        """Whether the next token's logits are to be changed at all."""
        s = self.sampling
        return bool(
            self._constraint
            or s.logit_bias
            or s.presence_penalty
            or s.frequency_penalty
            or s.repetition_penalty != 1
            or self._counts.total() < s.min_tokens
        )

    def adjust(self, logits: Float[Tensor, "vocab"]) -> None:
        """Apply biases, penalties, the least length and the constraint to one row of logits, in place."""
        s, device = self.sampling, logits.device
        if s.repetition_penalty != 1 and (known := sorted(self._prompt | self._counts.keys())):
            index = torch.tensor(known, device=device)
            values = logits[index]
            penalty = s.repetition_penalty
            logits[index] = torch.where(values > 0, values / penalty, values * penalty)
        if (s.presence_penalty or s.frequency_penalty) and self._counts:
            index = torch.tensor(list(self._counts), device=device)
            times = torch.tensor(list(self._counts.values()), device=device, dtype=logits.dtype)
            logits[index] -= s.presence_penalty + s.frequency_penalty * times
        if s.logit_bias:
            index = torch.tensor(list(s.logit_bias), device=device)
            logits[index] += torch.tensor(list(s.logit_bias.values()), device=device, dtype=logits.dtype)
        if self._counts.total() < s.min_tokens and self._ends:
            logits[torch.tensor(self._ends, device=device)] = -torch.inf
        if self._constraint is not None and self.failure is None:
            try:
                self._constraint.mask(logits)
            except ConstraintError as error:
                self.failure = error  # this request's alone: the others in the batch go on


def choose(logits: Float[Tensor, "batch vocab"], samplers: list[Sampler]) -> list[int]:
    """Choose a token for each row.

    Args:
        logits: the model's, in float32; not changed.
        samplers: one per row; each that samples draws one number.
    """
    adjusting = [row for row, sampler in enumerate(samplers) if sampler.adjusts]
    if adjusting:
        logits = logits.clone()
        for row in adjusting:
            samplers[row].adjust(logits[row])
    tokens: list[int] = logits.argmax(-1).tolist()
    sampled = [row for row, sampler in enumerate(samplers) if sampler.sampling.temperature > 0]
    if sampled:
        chosen = _sample(logits[sampled], [samplers[row] for row in sampled])
        for row, token in zip(sampled, chosen, strict=True):
            tokens[row] = token
    return tokens


def _sample(logits: Float[Tensor, "rows vocab"], samplers: list[Sampler]) -> list[int]:
    settings = [sampler.sampling for sampler in samplers]

    def column(values: list[float]) -> Float[Tensor, "rows 1"]:
        return torch.tensor(values, device=logits.device, dtype=torch.float32)[:, None]

    probabilities = torch.softmax(logits / column([s.temperature for s in settings]), dim=-1)
    uniform = column([sampler.uniform() for sampler in samplers])
    if all(s.top_k == 0 and s.top_p >= 1 for s in settings):
        return _search(probabilities, uniform).tolist()
    vocabulary = logits.shape[-1]
    top_k = column([s.top_k or vocabulary for s in settings])
    top_p = column([s.top_p for s in settings])
    # A few tokens nearly always hold what top_k and top_p keep; sort all of them only if they do not.
    for count in (min(FEW, vocabulary), vocabulary):
        ordered, order = probabilities.topk(count, dim=-1)
        in_top_k = torch.arange(count, device=logits.device) < top_k
        enough = (ordered.sum(-1, keepdim=True) >= top_p) | (top_k <= count)
        if count == vocabulary or bool(enough.all()):
            break
    kept = ordered * in_top_k
    kept = nucleus(kept / torch.where(top_k < vocabulary, kept.sum(-1, keepdim=True), 1), top_p)
    return order.gather(-1, _search(kept, uniform)[:, None])[:, 0].tolist()


def nucleus(ordered: Float[Tensor, "rows tokens"], top_p: Float[Tensor, "rows 1"]) -> Float[Tensor, "rows tokens"]:
    """Keep the smallest set of tokens that holds `top_p` of the probability (Holtzman et al., arXiv 1904.09751).

    Args:
        ordered: probabilities, the largest first.
        top_p: per row.

    Returns:
        The kept probabilities, not normalised; zero elsewhere. The most likely token is always kept.
    """
    before = ordered.cumsum(-1) - ordered
    return ordered * ((before < top_p) | (top_p >= 1))


def _search(weights: Float[Tensor, "rows tokens"], uniform: Float[Tensor, "rows 1"]) -> Tensor:
    """Return the token at which the cumulative weight passes the uniform share of the whole, `[rows]`."""
    # In float64: over a vocabulary, a float32 sum loses what rare tokens add.
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    found = torch.searchsorted(cumulative, uniform.double() * cumulative[:, -1:], right=True)[:, 0]
    # Rounding may point behind the last token that has any weight.
    last = weights.shape[-1] - 1 - (weights.flip(-1) > 0).int().argmax(-1)
    return torch.minimum(found, last)


def score(logits: Float[Tensor, "rows vocab"], tokens: list[int], top: list[int]) -> list[TokenScore]:
    """Return how likely one token per row was, under the unmodified distribution.

    Args:
        logits: the model's, in float32.
        tokens: one per row.
        top: per row, how many of the most likely tokens to report beside it.
    """
    whole = logits.logsumexp(-1)
    index = torch.tensor(tokens, device=logits.device)[:, None]
    logprobs: list[float] = (logits.gather(-1, index)[:, 0] - whole).tolist()
    if not any(top):
        return [TokenScore(logprob) for logprob in logprobs]
    best, order = logits.topk(min(max(top), logits.shape[-1]), dim=-1)
    alternatives = [
        tuple(zip(ids[:count], values[:count], strict=True))
        for ids, values, count in zip(order.tolist(), (best - whole[:, None]).tolist(), top, strict=True)
    ]
    return [TokenScore(logprob, found) for logprob, found in zip(logprobs, alternatives, strict=True)]
