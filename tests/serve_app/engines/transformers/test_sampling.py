"""Choosing tokens: against transformers' own logits processors, and against frequencies that can be computed by hand."""

from dataclasses import replace

import pytest
import torch
from scipy import stats
from transformers import (
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from serve_app.engines.protocol import Sampling
from serve_app.engines.transformers.sampling import FEW, Sampler, choose, nucleus, score

NONE: frozenset[int] = frozenset()


def sampler(sampling: Sampling, prompt: tuple[int, ...] = (), ends: frozenset[int] = NONE) -> Sampler:
    return Sampler(sampling, list(prompt), ends)


def draw(logits: torch.Tensor, sampling: Sampling, times: int) -> torch.Tensor:
    """The frequencies of the tokens that one request's stream samples."""
    one = sampler(sampling)
    counts = torch.bincount(torch.tensor([choose(logits[None], [one])[0] for _ in range(times)]), minlength=len(logits))
    return counts / times


def test_temperature_zero_takes_the_most_likely() -> None:
    assert choose(torch.tensor([[0.1, 3.0, 2.9]]), [sampler(Sampling(1, temperature=0))]) == [1]


def test_the_stream_depends_on_the_seed_alone() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))

    def stream(seed: int, company: int) -> list[int]:
        batch = [sampler(Sampling(1, seed=seed)), *(sampler(Sampling(1, seed=9, top_p=0.5)) for _ in range(company))]
        rows = logits[None].repeat(len(batch), 1)
        return [choose(rows, batch)[0] for _ in range(20)]

    assert stream(1, 0) == stream(1, 0)
    assert stream(1, 0) != stream(2, 0)
    assert stream(-1, 0) != stream(1, 0)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1, seed=0),
        Sampling(1, seed=0, temperature=0.5),
        Sampling(1, seed=0, top_k=3),
        Sampling(1, seed=0, top_p=0.7),
        Sampling(1, seed=0, temperature=1.5, top_k=4, top_p=0.8),
        Sampling(1, seed=0, min_p=0.3),
        Sampling(1, seed=0, temperature=2.0, top_k=5, top_p=0.9, min_p=0.2),
    ],
)
def test_frequencies_are_those_of_transformers_own_warpers(sampling: Sampling) -> None:
    logits = torch.randn(8, generator=torch.Generator().manual_seed(1)) * 2
    warped = TemperatureLogitsWarper(sampling.temperature)(None, logits[None])
    if sampling.top_k:
        warped = TopKLogitsWarper(sampling.top_k)(None, warped)
    if sampling.top_p < 1:
        warped = TopPLogitsWarper(sampling.top_p)(None, warped)
    if sampling.min_p:
        warped = MinPLogitsWarper(sampling.min_p)(None, warped)
    expected = warped.softmax(-1)[0]
    found = draw(logits, sampling, 4000)
    # Four standard errors of a frequency near one half are 0.032; what is cut off never comes.
    assert torch.allclose(found, expected, atol=0.032)
    assert (found[expected == 0] == 0).all()


@pytest.mark.parametrize("cut", [{}, {"top_k": 30, "top_p": 0.8, "temperature": 0.7}])
def test_draws_have_the_exact_probabilities(cut: dict[str, float]) -> None:
    """Chi-square over 8,000 draws of different seeds, from a peaked distribution over 2,000 tokens."""
    logits = torch.randn(2000, generator=torch.Generator().manual_seed(2)) * 2
    logits[:20] += 5
    settings = Sampling(1, **cut)
    warped = TemperatureLogitsWarper(settings.temperature)(None, logits[None])
    if settings.top_k:
        warped = TopKLogitsWarper(settings.top_k)(None, warped)
    if settings.top_p < 1:
        warped = TopPLogitsWarper(settings.top_p)(None, warped)
    expected = warped.double().softmax(-1)[0]
    drawn = []
    for seeds in torch.arange(8_000).split(500):
        batch = [sampler(replace(settings, seed=int(seed))) for seed in seeds]
        drawn += choose(logits.expand(500, -1), batch)
    counts = torch.bincount(torch.tensor(drawn), minlength=2000).double()
    assert counts[expected == 0].sum() == 0
    often = expected * len(drawn) >= 5
    observed = [*counts[often].tolist(), counts[~often].sum().item()]
    wanted = [*(expected[often] * len(drawn)).tolist(), (expected[~often].sum() * len(drawn)).item()]
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    assert stats.chisquare(observed, wanted, sum_check=False).pvalue > 1e-3


def stream_of(logits: torch.Tensor, beside: torch.Tensor, settings: Sampling, others: list[Sampling]) -> list[int]:
    """Twenty draws of one request from the same logits, beside others."""
    batch = [sampler(settings), *(sampler(other) for other in others)]
    rows = torch.cat([logits[None], beside[: len(others)]])
    return [choose(rows, batch)[0] for _ in range(20)]


@pytest.mark.parametrize("cut", [{}, {"top_k": 40}, {"top_p": 0.9}, {"top_p": 0.999}, {"min_p": 0.01}])
def test_neighbours_do_not_change_a_draw(cut: dict[str, float]) -> None:
    rows = torch.randn(5, 3 * FEW, generator=torch.Generator().manual_seed(3)) * 3
    settings = Sampling(1, seed=5, **cut)
    alone = stream_of(rows[0], rows[1:], settings, [])
    company = [Sampling(1, temperature=0), Sampling(1, top_p=0.99), Sampling(1, top_k=3), Sampling(1, temperature=2)]
    assert stream_of(rows[0], rows[1:], settings, company) == alone
    assert stream_of(rows[0], rows[1:] * 0, settings, company[1:]) == alone


def test_a_token_that_is_kept_is_drawn_whatever_else_is_cut() -> None:
    """The noise belongs to the tokens: cutting others, or ruling them out, leaves the winner."""
    logits = torch.randn(300, generator=torch.Generator().manual_seed(4)) * 2
    order = logits.argsort(descending=True).tolist()
    for seed in range(40):
        whole = choose(logits[None], [sampler(Sampling(1, seed=seed))])[0]
        rank = order.index(whole)
        assert choose(logits[None], [sampler(Sampling(1, seed=seed, top_k=rank + 1))]) == [whole]
        others = dict.fromkeys(order[rank + 1 :][:5], -100.0)
        assert choose(logits[None], [sampler(Sampling(1, seed=seed, logit_bias=others))]) == [whole]


def test_rounding_rarely_changes_a_draw() -> None:
    """Logits rounded to bfloat16, as another kernel would round them: few draws change, many with a cumulative sum."""
    logits = torch.randn(20_000, generator=torch.Generator().manual_seed(5)) * 0.5
    rounded = logits + torch.randn(20_000, generator=torch.Generator().manual_seed(6)) * 0.004
    changed = by_sum = 0
    for seed in range(200):
        first, second = (choose(row[None], [sampler(Sampling(1, seed=seed))])[0] for row in (logits, rounded))
        changed += first != second
        uniform = torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found = [int(torch.searchsorted(row.double().softmax(-1).cumsum(-1), uniform)) for row in (logits, rounded)]
        by_sum += found[0] != found[1]
    assert changed <= 6
    assert by_sum > 25, "the control: the old way changes with any rounding before the token"


def test_a_nucleus_wider_than_the_first_tokens_is_looked_for_in_all() -> None:
    flat = torch.zeros(4 * FEW)
    tokens = {choose(flat[None], [one])[0] for one in (sampler(Sampling(1, seed=i, top_p=0.9)) for i in range(60))}
    assert len(tokens) > 50  # and not only FEW of them: the chance that 60 draws stay in a quarter is nil
    assert max(tokens) > FEW


def test_a_least_probability_that_more_than_the_first_tokens_reach_keeps_them_all() -> None:
    flat = torch.zeros(4 * FEW)
    flat[3 * FEW :] = -2.0
    drawn = [choose(flat[None], [sampler(Sampling(1, seed=i, min_p=0.5))])[0] for i in range(80)]
    assert FEW < max(drawn) < 3 * FEW


def test_only_allowed_tokens_are_left() -> None:
    logits = torch.randn(9, generator=torch.Generator().manual_seed(7))
    expected = torch.full((9,), -torch.inf)
    expected[[2, 5]] = logits[[2, 5]] + torch.tensor([0.0, 3.0])
    one = sampler(Sampling(1, allowed_token_ids=(5, 2), logit_bias={5: 3.0, 1: 50.0}))
    one.adjust(logits)
    assert logits.tolist() == expected.tolist()


def test_bad_words_are_those_of_transformers() -> None:
    words = ((3,), (1, 2), (2, 1, 0), (1, 1))
    processor = NoBadWordsLogitsProcessor([list(word) for word in words], eos_token_id=None)
    for said in ([], [1], [2, 1], [1, 2], [2, 2, 1], [0, 1, 1]):
        one = sampler(Sampling(9, bad_words=words), prompt=(2, 1))  # words are looked for in the completion
        for token in said:
            one.accept(token)
        logits = torch.arange(5.0)
        expected = processor(torch.tensor([said], dtype=torch.long), logits[None].clone())[0]
        one.adjust(logits)
        assert logits.tolist() == expected.tolist(), said


def test_nucleus_keeps_the_smallest_set_that_reaches_top_p() -> None:
    ordered = torch.tensor([[0.5, 0.25, 0.15, 0.1]])

    def kept(top_p: float) -> int:
        return int((nucleus(ordered, torch.tensor([[top_p]])) > 0).sum())

    assert [kept(p) for p in (1e-9, 0.5, 0.51, 0.8, 1.0)] == [1, 1, 2, 3, 4]


def test_penalties_against_hand_computed_logits() -> None:
    one = sampler(Sampling(9, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={3: -100.0}))
    for token in (1, 1, 2):
        one.accept(token)
    logits = torch.tensor([1.0, 1.0, 1.0, 1.0])
    one.adjust(logits)
    assert logits.tolist() == [1.0, 0.0, 0.25, -99.0]


def test_repetition_penalty_is_transformers() -> None:
    logits = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0])
    one = sampler(Sampling(9, repetition_penalty=1.3), prompt=(0, 3))
    one.accept(1)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[0, 3, 1]]), logits[None].clone())[0]
    one.adjust(logits)
    torch.testing.assert_close(logits, expected)


def test_nothing_ends_before_the_least_length() -> None:
    one = sampler(Sampling(9, min_tokens=2, temperature=0), ends=frozenset({0}))
    logits = torch.tensor([[5.0, 1.0]])
    chosen = []
    for _ in range(3):
        chosen += choose(logits, [one])
        one.accept(chosen[-1])
    assert chosen == [1, 1, 0]
    assert logits.tolist() == [[5.0, 1.0]], "the logits are the caller's, for the scores"


def test_scores_against_log_softmax() -> None:
    logits = torch.randn(3, 11)
    expected = torch.log_softmax(logits, -1)
    scores = score(logits, [4, 0, 10], [0, 2, 11])
    torch.testing.assert_close(torch.tensor([s.logprob for s in scores]), expected[range(3), [4, 0, 10]])
    assert [len(s.top) for s in scores] == [0, 2, 11]
    assert [token for token, _ in scores[2].top] == expected[2].argsort(descending=True).tolist()
    torch.testing.assert_close(torch.tensor([p for _, p in scores[1].top]), expected[1].topk(2).values)
