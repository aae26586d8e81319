"""Samples the next token of each row of a batch, with each row's own settings and random stream.

Everything that is the same for all rows runs once for the batch, on the model's device. A token is sampled by adding noise to
the logits that top_k, top_p and min_p keep, and taking the largest, which is the same as sampling from their softmax
(`noise`). A token's noise depends on the request's seed, on the number of tokens of the request, and on the token id. So a
seed has the same effect whatever runs beside the request, and logits that differ by rounding rarely sample another token.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from serve_app.engines.protocol import Constraint, ConstraintError, Sampling, TokenScore
from serve_app.engines.transformers.noise import gumbel

FEW = 1024
"""Number of most likely tokens that are searched first for the kept ones; sorting a whole vocabulary costs much more."""


class Sampler:
    """One request's settings, its random stream, and the state of its penalties.

    Attributes:
        sampling: the settings.
        failure: why its constraint can no longer be followed; the request must then fail.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt_ids: list[int],
        all_stop_token_ids: frozenset[int],
        constraint: Constraint | None = None,
    ) -> None:
        """Start a request's random stream.

        Args:
            sampling: its settings.
            prompt_ids: its prompt.
            all_stop_token_ids: tokens that end it, `sampling.stop_token_ids` included.
            constraint: the grammar it follows.
        """
        self.sampling = sampling
        self.failure: ConstraintError | None = None
        self._constraint = constraint
        self._random = np.random.default_rng(None if sampling.seed is None else sampling.seed % 2**128)
        self._all_stop_token_ids = sorted(all_stop_token_ids)
        self._counts: Counter[int] = Counter()
        self._prompt = set(prompt_ids) if sampling.repetition_penalty != 1 else set()
        self._words = sampling.bad_words
        self._last: deque[int] = deque(maxlen=max(map(len, self._words), default=1) - 1)

    def key(self) -> tuple[int, int]:
        """Draw the key of the next token's noise from the stream: two numbers of 32 bits."""
        first, second = divmod(int(self._random.bit_generator.random_raw()), 1 << 32)
        return first, second

    def accept(self, token: int) -> None:
        """Update the state with a generated token."""
        self._counts[token] += 1
        self._last.append(token)
        if self._constraint is not None and self.failure is None:
            try:
                self._constraint.accept(token)
            except ConstraintError as error:
                self.failure = error

    @property
    def adjusts(self) -> bool:
        """Whether the next token's logits must be changed."""
        s = self.sampling
        return bool(
            self._constraint
            or s.logit_bias
            or s.presence_penalty
            or s.frequency_penalty
            or s.repetition_penalty != 1
            or s.allowed_token_ids is not None
            or s.bad_words
            or self._counts.total() < s.min_tokens
        )

    def adjust(self, logits: Float[Tensor, "vocab"]) -> None:
        """Apply biases, penalties and constraints to one row of logits, in place."""
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
        if self._counts.total() < s.min_tokens and self._all_stop_token_ids:
            logits[torch.tensor(self._all_stop_token_ids, device=device)] = -torch.inf
        if s.allowed_token_ids is not None:
            index = torch.tensor(s.allowed_token_ids, device=device)
            logits.copy_(torch.full_like(logits, -torch.inf).index_copy_(0, index, logits[index]))
        if ruled_out := self._completing():
            logits[torch.tensor(ruled_out, device=device)] = -torch.inf
        if self._constraint is not None and self.failure is None:
            try:
                self._constraint.mask(logits)
            except ConstraintError as error:
                self.failure = error  # only this request fails

    def _completing(self) -> list[int]:
        """Return the tokens that would complete a bad word."""
        last = tuple(self._last)
        return [end for *before, end in self._words if not before or last[-len(before) :] == tuple(before)]


def choose(logits: Float[Tensor, "batch vocab"], samplers: list[Sampler]) -> list[int]:
    """Sample a token for each row.

    Args:
        logits: the model's, in float32; not changed.
        samplers: one per row; each one with a temperature draws one key.
    """
    adjusting = [row for row, sampler in enumerate(samplers) if sampler.adjusts]
    if adjusting:
        logits = logits.clone()
        for row in adjusting:
            samplers[row].adjust(logits[row])
    tokens: list[int] = logits.argmax(-1).tolist()
    free: list[int] = []
    cut: list[int] = []
    for row, sampler in enumerate(samplers):
        if (s := sampler.sampling).temperature > 0:
            (free if s.top_k == 0 and s.top_p >= 1 and s.min_p == 0 else cut).append(row)
    for rows in _group_rows(free, logits.device):
        scaled, settings, keys = _scaled(logits, samplers, rows)
        ids = torch.arange(logits.shape[-1], device=logits.device).expand(len(rows), -1)
        _take(tokens, rows, _largest(scaled, ids, keys))
    if cut:
        scaled, settings, keys = _scaled(logits, samplers, cut)
        _take(tokens, cut, _sample_cut(scaled, settings, keys))
    return tokens


def _take(tokens: list[int], rows: list[int], chosen: list[int]) -> None:
    for row, token in zip(rows, chosen, strict=True):
        tokens[row] = token


def _scaled(
    logits: Float[Tensor, "batch vocab"], samplers: list[Sampler], rows: list[int]
) -> tuple[Float[Tensor, "rows vocab"], list[Sampling], list[tuple[int, int]]]:
    """Return some rows' logits divided by their temperatures, their settings, and the keys of their noise."""
    settings = [samplers[row].sampling for row in rows]
    scaled = _rows(logits, rows) / _column([s.temperature for s in settings], logits)
    return scaled, settings, [samplers[row].key() for row in rows]


def _rows(values: Tensor, rows: list[int]) -> Tensor:
    return values if len(rows) == len(values) else values[rows[0], None] if len(rows) == 1 else values[rows]


def _sample_cut(
    scaled: Float[Tensor, "rows vocab"], settings: list[Sampling], keys: list[tuple[int, int]]
) -> list[int]:
    """Sample a token per row from those that top_k, top_p and min_p keep."""
    tokens = [0] * len(settings)
    left = list(range(len(settings)))
    # A few tokens nearly always contain all kept ones; the whole vocabulary is sorted only for rows where they do not.
    for count in (min(FEW, scaled.shape[-1]), scaled.shape[-1]):
        if not left:
            break
        values, ids, enough = _kept(_rows(scaled, left), [settings[row] for row in left], count)
        _take(tokens, left, _largest(values, ids, [keys[row] for row in left]))
        left = [row for row, found in zip(left, enough, strict=True) if not found]
    return tokens


def _group_rows(rows: list[int], device: torch.device) -> list[list[int]]:
    """Group rows that are computed together: on a CPU one at a time, which fits into its cache."""
    return [[row] for row in rows] if device.type == "cpu" else [rows] if rows else []


def _kept(
    scaled: Float[Tensor, "rows vocab"], settings: list[Sampling], count: int
) -> tuple[Float[Tensor, "rows tokens"], Int[Tensor, "rows tokens"], list[bool]]:
    """Find the tokens that top_k, top_p and min_p keep among the `count` most likely ones.

    Returns:
        The logits of these tokens, with minus infinity for those that are not kept; their ids; and per row, whether all kept
            tokens are among them.
    """
    vocabulary = scaled.shape[-1]
    top_k = _column([s.top_k or vocabulary for s in settings], scaled)
    top_p = _column([s.top_p for s in settings], scaled)
    ordered, ids = torch.softmax(scaled, dim=-1).topk(count, dim=-1)
    kept = ordered * (torch.arange(count, device=scaled.device) < top_k)
    enough = (ordered.sum(-1, keepdim=True) >= top_p) | (top_k <= count)
    kept = nucleus(kept / torch.where(top_k < vocabulary, kept.sum(-1, keepdim=True), 1), top_p)
    if any(s.min_p for s in settings):
        least = ordered[:, :1] * _column([s.min_p for s in settings], scaled)
        kept = kept.masked_fill(ordered < least, 0)
        enough |= ordered[:, -1:] < least
    return scaled.gather(-1, ids).masked_fill_(kept == 0, -torch.inf), ids, enough[:, 0].tolist()


def _largest(
    scaled: Float[Tensor, "rows tokens"], ids: Int[Tensor, "rows tokens"], keys: list[tuple[int, int]]
) -> list[int]:
    """Sample one token per row from the softmax of its logits."""
    place = (scaled + gumbel(ids, keys)).argmax(-1, keepdim=True)
    return ids.gather(-1, place)[:, 0].tolist()


def _column(values: list[float], beside: Tensor) -> Float[Tensor, "rows 1"]:
    return torch.tensor(values, device=beside.device, dtype=torch.float32)[:, None]


def nucleus(ordered: Float[Tensor, "rows tokens"], top_p: Float[Tensor, "rows 1"]) -> Float[Tensor, "rows tokens"]:
    """Keep the smallest set of tokens that has `top_p` of the probability (Holtzman et al., arXiv 1904.09751).

    Args:
        ordered: probabilities, the largest first.
        top_p: per row.

    Returns:
        The kept probabilities, not normalized, and zero elsewhere. The most likely token is always kept.
    """
    before = ordered.cumsum(-1) - ordered
    return ordered * ((before < top_p) | (top_p >= 1))


def score_named(logits: Float[Tensor, "vocab"], tokens: Sequence[int]) -> tuple[tuple[int, float], ...]:
    """Return the log-probabilities of some tokens at one position, in the form of `TokenScore.top`."""
    index = torch.tensor(list(dict.fromkeys(tokens)), device=logits.device)
    return tuple(zip(index.tolist(), (logits[index] - logits.logsumexp(-1)).tolist(), strict=True))


def score_prompt(logits: Float[Tensor, "rows vocab"], tokens: list[int], sampling: Sampling) -> list[TokenScore]:
    """Return the scores of a prompt's tokens, as `score` does, with their ranks if `sampling.prompt_logprobs` is set.

    Args:
        logits: the model's logits at the position before each token, in float32.
        tokens: the tokens.
        sampling: how many of the most likely tokens to report beside each.
    """
    found = score(logits, tokens, [max(sampling.top_logprobs, sampling.prompt_logprobs or 0)] * len(tokens))
    if sampling.prompt_logprobs is None:
        return found
    own = logits.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])
    ranks = 1 + (logits > own).sum(-1)
    return [replace(one, rank=rank) for one, rank in zip(found, ranks.tolist(), strict=True)]


def score(logits: Float[Tensor, "rows vocab"], tokens: list[int], top: list[int]) -> list[TokenScore]:
    """Return the score of one token per row, under the unmodified distribution.

    Args:
        logits: the model's, in float32.
        tokens: one per row.
        top: per row, how many of the most likely tokens to report beside it.
    """
    # Row by row: over many columns, the rounding of a sum depends on the number of rows.
    whole = torch.stack([row.logsumexp(-1) for row in logits])
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
