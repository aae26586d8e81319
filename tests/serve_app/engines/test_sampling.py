import torch

from serve_app.engines.protocol import Sampling
from serve_app.engines.sampling import Sampler, nucleus, token_logprobs


def test_temperature_zero_takes_the_most_likely() -> None:
    assert Sampler(Sampling(1, temperature=0)).choose(torch.tensor([0.1, 3.0, 2.9])) == 1


def test_the_stream_depends_on_the_seed_alone() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))

    def draw(seed: int) -> list[int]:
        sampler = Sampler(Sampling(1, seed=seed))
        return [sampler.choose(logits) for _ in range(20)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_frequencies_follow_the_probabilities() -> None:
    sampler = Sampler(Sampling(1, temperature=1.0, seed=0))
    probabilities = torch.tensor([0.7, 0.2, 0.1])
    draws = torch.tensor([sampler.choose(probabilities.log()) for _ in range(4000)])
    # Three standard errors of a frequency near 0.7 with 4,000 draws is 0.022.
    assert torch.allclose(torch.bincount(draws, minlength=3) / 4000, probabilities, atol=0.025)


def test_nucleus_keeps_the_smallest_set_that_reaches_top_p() -> None:
    probabilities = torch.tensor([0.1, 0.5, 0.15, 0.25])
    assert nucleus(probabilities, 0.5).nonzero().flatten().tolist() == [1]
    assert nucleus(probabilities, 0.51).nonzero().flatten().tolist() == [1, 3]
    assert nucleus(probabilities, 0.8).nonzero().flatten().tolist() == [1, 2, 3]
    assert nucleus(probabilities, 1e-9).nonzero().flatten().tolist() == [1]
    assert torch.equal(nucleus(probabilities, 1.0), probabilities)


def test_logprobs_against_log_softmax() -> None:
    logits = torch.randn(3, 11)
    expected = torch.log_softmax(logits, -1)[range(3), [4, 0, 10]]
    torch.testing.assert_close(torch.tensor(token_logprobs(logits, [4, 0, 10])), expected)
