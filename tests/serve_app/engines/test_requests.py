"""What one request may ask of the engine, each checked against transformers alone."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from serve_app.engines.protocol import EngineStoppedError, RequestTooLargeError, Sampling
from serve_app.engines.transformers.engine import MAX_DEAD_FORWARDS, TransformersEngine
from serve_app.engines.transformers.loaded_model import LoadedModel
from tests.serve_app import tiny
from tests.serve_app.alone import forward_with_hooks, generate_alone, plan
from tests.serve_app.tiny import Call, run

PROMPT = [10, 11, 12, 13, 14, 15, 16, 17, 18]
GREEDY = Sampling(max_tokens=12, temperature=0)


@pytest.fixture(scope="module")
def llama() -> LoadedModel:
    return tiny.loaded("llama")


@pytest.fixture
def engine(llama: LoadedModel) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(llama)
    yield engine
    engine.close()


def generate_with(model: LoadedModel, prompt: list[int], **settings: Any) -> list[int]:
    plain = tiny.module("llama")
    plain.generation_config = model.observed._module.generation_config
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = plain.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **settings)
    return output[0, len(prompt) :].tolist()


def test_penalised_greedy_tokens_are_those_of_generate(engine: TransformersEngine, llama: LoadedModel) -> None:
    long = replace(GREEDY, max_tokens=60)
    plain = generate_alone(llama, PROMPT, 60)
    banned = dict.fromkeys(plain, -100.0)
    penalized, biased = run(
        engine, [Call(PROMPT, replace(long, repetition_penalty=3.0)), Call(PROMPT, replace(long, logit_bias=banned))]
    )
    assert penalized.token_ids == generate_with(llama, PROMPT, max_new_tokens=60, repetition_penalty=3.0)
    assert penalized.token_ids != plain
    expected = generate_with(llama, PROMPT, max_new_tokens=60, bad_words_ids=[[token] for token in banned])
    assert biased.token_ids == expected


def test_a_frequency_penalty_stops_repetition(engine: TransformersEngine) -> None:
    plain, penalized = run(engine, [Call(PROMPT, replace(GREEDY, max_tokens=60, frequency_penalty=f)) for f in (0, 2)])
    assert len(set(penalized.token_ids)) > len(set(plain.token_ids))


def test_a_stop_token_ends_it_and_is_no_text(engine: TransformersEngine, llama: LoadedModel) -> None:
    expected = generate_alone(llama, PROMPT, 12)
    (result,) = run(engine, [Call(PROMPT, replace(GREEDY, stop_token_ids=frozenset({expected[5]})))])
    stop = expected.index(expected[5])
    assert result.token_ids == expected[: stop + 1]
    assert result.finish_reason == "stop"
    assert result.text == llama.tokenizer.decode(expected[:stop])


def test_the_least_length_holds_back_stop_tokens_and_stop_strings(
    engine: TransformersEngine, llama: LoadedModel
) -> None:
    expected = generate_alone(llama, PROMPT, 40)
    first = frozenset(expected[:1])
    stopped, held = run(
        engine,
        [
            Call(PROMPT, replace(GREEDY, stop_token_ids=first)),
            Call(PROMPT, replace(GREEDY, stop_token_ids=first, min_tokens=6)),
        ],
    )
    assert len(stopped.token_ids) == 1
    assert len(held.token_ids) >= 6
    letter = llama.tokenizer.decode(expected[:1])
    (held,) = run(engine, [Call(PROMPT, replace(GREEDY, stop=(letter,), min_tokens=4))])
    assert len(held.token_ids) >= 4


def test_top_logprobs_are_the_models_own(engine: TransformersEngine, llama: LoadedModel) -> None:
    (result,) = run(engine, [Call(PROMPT, Sampling(6, temperature=0.5, seed=3, top_logprobs=4))])
    tokens = PROMPT + result.token_ids
    with torch.inference_mode():
        expected = llama.observed._module(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
    for at, score in enumerate(result.scores, start=len(PROMPT) - 1):
        values, order = expected[at].topk(4)
        assert [token for token, _ in score.top] == order.tolist()
        torch.testing.assert_close(torch.tensor([p for _, p in score.top]), values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("max_prefill_tokens", [0, 4])
def test_a_prompt_is_only_read_and_scored(llama: LoadedModel, max_prefill_tokens: int) -> None:
    """Nothing is generated; all prompt rows and all token scores are kept, also if the prompt is read in pieces."""
    engine = TransformersEngine(llama, max_prefill_tokens=max_prefill_tokens)
    asked = plan(llama, "resid_post", layers=(1,))
    calls = [Call(prompt, Sampling(0, top_logprobs=1), asked) for prompt in (PROMPT, PROMPT[:4], PROMPT[:1])]
    for call in calls:
        call.job = replace(call.job, score_prompt=True)
    results = run(engine, calls)
    engine.close()
    for call, result in zip(calls, results, strict=True):
        prompt = call.job.prompt_ids
        assert (result.token_ids, result.text, result.finish_reason) == ([], "", "length")
        with torch.inference_mode():
            logprobs = llama.observed._module(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
        expected = logprobs[:-1].gather(1, torch.tensor(prompt[1:], dtype=torch.long)[:, None])[:, 0]
        assert result.prompt_scores is not None
        found = torch.tensor([score.logprob for score in result.prompt_scores])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert [score.top[0][0] for score in result.prompt_scores] == logprobs[:-1].argmax(-1).tolist()
        assert result.captured is not None
        rows = forward_with_hooks(llama, prompt, {"x": ("model.layers.1", "output")})["x"]
        torch.testing.assert_close(result.captured.tensors["layers.1.resid_post"], rows, rtol=1e-4, atol=1e-4)


def test_a_prompt_read_in_pieces_captures_and_continues_the_same(llama: LoadedModel) -> None:
    prompt = [(3 * i) % 250 for i in range(50)]
    engine = TransformersEngine(llama, max_prefill_tokens=7)
    asked = plan(llama, "resid_post", layers=(1,)), plan(llama, "resid_post", layers=(1,), positions="mean_prompt")
    whole, pooled = run(engine, [Call(prompt, GREEDY, one) for one in asked])
    engine.close()
    assert whole.token_ids == pooled.token_ids == generate_alone(llama, prompt, 12)
    rows = forward_with_hooks(llama, prompt + whole.token_ids[:-1], {"x": ("model.layers.1", "output")})["x"]
    assert whole.captured is not None
    assert pooled.captured is not None
    torch.testing.assert_close(whole.captured.tensors["layers.1.resid_post"], rows, rtol=1e-4, atol=1e-4)
    mean = rows[:50].mean(0, keepdim=True)
    torch.testing.assert_close(pooled.captured.tensors["layers.1.resid_post"], mean, rtol=1e-4, atol=1e-5)


def test_per_head_values_are_captured_with_their_shape() -> None:
    model = tiny.loaded("qwen3")
    engine = TransformersEngine(model)
    (result,) = run(engine, [Call(PROMPT, GREEDY, plan(model, "self_attn.q_norm.output", layers=(0,)))])
    engine.close()
    fed = PROMPT + result.token_ids[:-1]
    expected = forward_with_hooks(model, fed, {"x": ("model.layers.0.self_attn.q_norm", "output")})["x"]
    assert result.captured is not None
    rows = result.captured.tensors["layers.0.self_attn.q_norm.output"]
    assert rows.shape == (len(fed), 4, 8)
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-4)


def test_what_can_never_fit_is_refused_at_once_and_the_rest_takes_turns(llama: LoadedModel) -> None:
    engine = TransformersEngine(llama, max_cache_tokens=50)
    with pytest.raises(RequestTooLargeError, match="the KV cache holds 50"):
        engine.submit(Call(PROMPT, Sampling(42, temperature=0)).job)
    # 21 tokens each: two fit beside each other, a third does not.
    widths: list[int] = []
    handle = llama.observed._module.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    results = run(engine, [Call(PROMPT, GREEDY) for _ in range(5)])
    handle.remove()
    engine.close()
    assert max(widths) == 2
    assert all(result.token_ids == generate_alone(llama, PROMPT, 12) for result in results)


def test_an_engine_that_only_fails_gives_up(llama: LoadedModel) -> None:
    """A broken GPU fails every forward: the engine must end, so that the replica is restarted, and never hang."""
    engine = TransformersEngine(llama)

    def explode(*args: Any) -> None:
        raise RuntimeError("broken for good")

    handle = llama.observed._module.register_forward_pre_hook(explode)
    try:
        for _ in range(MAX_DEAD_FORWARDS):
            with pytest.raises(RuntimeError, match="broken for good"):
                run(engine, [Call(PROMPT, GREEDY)])
        engine._thread.join(timeout=10)
        assert not engine.alive
        with pytest.raises(EngineStoppedError):
            engine.submit(Call(PROMPT, GREEDY).job)
    finally:
        handle.remove()


def test_an_engine_recovers_from_one_failure(engine: TransformersEngine, llama: LoadedModel) -> None:
    forwards = iter(range(100))

    def explode_once(*args: Any) -> None:
        if next(forwards) == 4:
            raise RuntimeError("out of luck")

    handle = llama.observed._module.register_forward_pre_hook(explode_once)
    calls = [Call(PROMPT, GREEDY) for _ in range(3)]
    for call in calls:
        engine.submit(call.job)
    results = [call.result() for call in calls]
    handle.remove()
    assert next(forwards) > 5
    assert [result.token_ids for result in results] == [generate_alone(llama, PROMPT, 12)] * 3


def test_a_model_whose_cache_cannot_be_joined_runs_in_static_batches(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.loaded("lfm2")
    prompts = [PROMPT, PROMPT[:3], PROMPT[2:7]]
    with caplog.at_level("WARNING"):
        engine = TransformersEngine(model)
    calls = [
        Call(p, replace(GREEDY, max_tokens=n), plan(model, "resid_post"))
        for p, n in zip(prompts, (12, 4, 7), strict=True)
    ]
    results = run(engine, calls)
    engine.close()
    assert "static batches" in caplog.text
    for call, result in zip(calls, results, strict=True):
        sampling = call.job.sampling
        assert result.token_ids == generate_alone(model, call.job.prompt_ids, sampling.max_tokens)
        fed = call.job.prompt_ids + result.token_ids[:-1]
        expected = forward_with_hooks(
            model, fed, {f"layers.{i}.resid_post": (f"model.layers.{i}", "output") for i in range(3)}
        )
        assert result.captured is not None
        for key, rows in result.captured.tensors.items():
            assert ((rows - expected[key]).norm(dim=1) / expected[key].norm(dim=1)).max() <= 1e-4, key


def test_one_module_under_two_names() -> None:
    """In a parallel block with one norm, attention and the MLP have the same input."""
    model = tiny.loaded("cohere")
    engine = TransformersEngine(model)
    both, one = run(
        engine, [Call(PROMPT, GREEDY, plan(model, *names)) for names in (("ln_attn", "ln_mlp"), ("ln_mlp",))]
    )
    engine.close()
    assert both.captured is not None
    assert one.captured is not None
    for layer in range(model.structure.num_layers):
        attention, mlp = (both.captured.tensors[f"layers.{layer}.{name}"] for name in ("ln_attn", "ln_mlp"))
        assert torch.equal(attention, mlp)
        torch.testing.assert_close(one.captured.tensors[f"layers.{layer}.ln_mlp"], mlp, rtol=1e-4, atol=1e-5)
