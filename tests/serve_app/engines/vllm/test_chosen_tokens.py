"""Log-probabilities of chosen tokens, against vLLM's own sampler."""

from dataclasses import replace

import pytest
import torch
from vllm.v1.sample.sampler import Sampler

from serve_app.engines.vllm.chosen_tokens import ChosenTokenSampler, log_probabilities
from serve_app.engines.vllm.worker_messages import CHOSEN_ONLY, UNSCORED


@pytest.fixture
def metadata():  # type: ignore[no-untyped-def]
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata

    return SamplingMetadata(
        temperature=None,
        all_greedy=True,
        all_random=False,
        top_p=None,
        top_k=None,
        generators={},
        max_num_logprobs=CHOSEN_ONLY,
        no_penalties=False,
        prompt_token_ids=torch.tensor([[1, 2], [3, 4], [5, 6]]),
        frequency_penalties=torch.tensor([0.0, 0.5, 0.0]),
        presence_penalties=torch.tensor([0.0, 0.5, 9.0]),
        repetition_penalties=torch.tensor([1.0, 1.0, 1.5]),
        output_token_ids=[[7], [8, 8], [9]],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_those_of_the_models_own_logits(metadata, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    logits = (5 * torch.randn(3, 300, generator=torch.Generator().manual_seed(0))).to(dtype)
    logits[2, 9] = 30  # the likeliest by far, and penalized
    ours = ChosenTokenSampler()(logits=logits.clone(), sampling_metadata=metadata)
    theirs = Sampler()(logits=logits.clone(), sampling_metadata=replace(metadata, max_num_logprobs=0))
    assert torch.equal(ours.sampled_token_ids, theirs.sampled_token_ids)
    assert torch.equal(ours.logprobs_tensors.logprob_token_ids, theirs.logprobs_tensors.logprob_token_ids)
    torch.testing.assert_close(ours.logprobs_tensors.logprobs, theirs.logprobs_tensors.logprobs)
    expected = logits.float().log_softmax(-1).gather(1, ours.sampled_token_ids.long())
    torch.testing.assert_close(ours.logprobs_tensors.logprobs, expected)


def test_a_large_batch_is_normalized_in_parts() -> None:
    logits = 5 * torch.randn(37, 300, generator=torch.Generator().manual_seed(0))
    chosen = torch.arange(37)[:, None]
    expected = logits.double().log_softmax(-1).gather(1, chosen).float()
    torch.testing.assert_close(log_probabilities(logits, chosen.int()), expected)


def test_who_asks_for_more_gets_vllms_own(metadata) -> None:  # type: ignore[no-untyped-def]
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    asked = replace(metadata, max_num_logprobs=2)
    ours, theirs = (kind()(logits=logits.clone(), sampling_metadata=asked) for kind in (ChosenTokenSampler, Sampler))
    for a, b in zip(ours.logprobs_tensors[:3], theirs.logprobs_tensors[:3], strict=True):
        assert torch.equal(a, b)
    assert ours.logprobs_tensors.logprobs.shape == (3, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_who_asks_for_nothing_hears_only_of_logits_that_are_no_numbers(metadata, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    asked = replace(metadata, max_num_logprobs=UNSCORED)
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours, theirs = (kind()(logits=logits.clone(), sampling_metadata=asked) for kind in (ChosenTokenSampler, Sampler))
    assert ours.logprobs_tensors is None
    assert torch.equal(ours.sampled_token_ids, theirs.sampled_token_ids)
    for broken in (torch.nan, torch.inf):
        bad = logits.clone()
        bad[1, 17] = broken
        heard = ChosenTokenSampler()(logits=bad, sampling_metadata=asked).logprobs_tensors.logprobs[:, 0]
        assert heard.isnan().tolist() == [False, True, False]
