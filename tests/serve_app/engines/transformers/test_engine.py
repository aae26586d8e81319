"""The engine against independent paths: transformers' own `generate`, and a teacher-forced forward with plain hooks."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from serve_app.capture.rows import UncapturableError
from serve_app.engines.protocol import EngineBusyError, EngineStoppedError, Failed, Finished, Sampling, TextDelta
from serve_app.engines.transformers.engine import TransformersEngine
from serve_app.engines.transformers.loaded_model import LoadedModel
from tests.serve_app import tiny
from tests.serve_app.alone import LLAMA_MODULES, forward_with_hooks, generate_alone, layer_path, plan
from tests.serve_app.tiny import Call, run

PROMPTS = [[5, 6, 7], [10, 11, 12, 13, 14, 15, 16, 17, 18], [40], [3, 1, 4, 1, 5, 9]]
GREEDY = Sampling(max_tokens=12, temperature=0)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "olmo2", "gpt2", "gpt_neox"])
def test_greedy_batches_equal_generate_alone(architecture: str) -> None:
    model = tiny.loaded(architecture)
    engine = TransformersEngine(model)
    results = run(engine, [Call(prompt, GREEDY) for prompt in PROMPTS])
    engine.close()
    assert [r.token_ids for r in results] == [generate_alone(model, prompt, 12) for prompt in PROMPTS]


GEMMA2_MODULES = LLAMA_MODULES | {
    "resid_mid": (".pre_feedforward_layernorm", "input"),
    "attn_out": (".post_attention_layernorm", "output"),
    "mlp_out": (".post_feedforward_layernorm", "output"),
    "ln_mlp": (".pre_feedforward_layernorm", "output"),
}
GPT2_MODULES = LLAMA_MODULES | {
    "resid_mid": (".ln_2", "input"),
    "attn_out": (".attn", "output"),
    "ln_attn": (".ln_1", "output"),
    "ln_mlp": (".ln_2", "output"),
}


@pytest.mark.parametrize(
    ("architecture", "where"), [("llama", LLAMA_MODULES), ("gemma2", GEMMA2_MODULES), ("gpt2", GPT2_MODULES)]
)
def test_captured_rows_equal_a_teacher_forced_forward(architecture: str, where: dict[str, tuple[str, str]]) -> None:
    model = tiny.loaded(architecture)
    engine = TransformersEngine(model)
    calls = [
        Call(prompt, Sampling(max_tokens=4 + 3 * i, temperature=0), plan(model, *where))
        for i, prompt in enumerate(PROMPTS)
    ]
    results = run(engine, calls)
    engine.close()
    modules = {
        f"layers.{i}.{name}": (f"{layer_path(model)}.{i}{path}", side)
        for i in range(3)
        for name, (path, side) in where.items()
    }
    for prompt, result in zip(PROMPTS, results, strict=True):
        fed = prompt + result.token_ids[:-1]
        expected = forward_with_hooks(model, fed, modules)
        assert result.captured is not None
        assert result.captured.position.tolist() == list(range(len(fed)))
        assert set(result.captured.tensors) == set(expected)
        for key, rows in result.captured.tensors.items():
            error = (rows - expected[key]).norm(dim=1) / expected[key].norm(dim=1)
            assert error.max() <= 1e-4, f"{key}: {error.max()}"


def test_requests_of_one_batch_may_ask_for_different_things(engine: TransformersEngine, llama: LoadedModel) -> None:
    calls = [
        Call(PROMPTS[0], GREEDY, plan(llama, "resid_post", layers=(0,))),
        Call(PROMPTS[1], GREEDY, plan(llama, "mlp.gate_proj.output", "embed", layers=(2,), positions="last_prompt")),
        Call(PROMPTS[2], GREEDY),
        Call(PROMPTS[3], GREEDY, plan(llama, "resid_post", layers=(0,), positions="mean_generated")),
    ]
    first, second, third, fourth = run(engine, calls)
    assert first.captured is not None
    assert list(first.captured.tensors) == ["layers.0.resid_post"]
    assert second.captured is not None
    assert second.captured.tensors["layers.2.mlp.gate_proj.output"].shape == (1, 64)
    assert second.captured.position.tolist() == [8]
    assert third.captured is None
    assert fourth.captured is not None
    assert fourth.captured.position.tolist() == [-1]
    fed = PROMPTS[3] + fourth.token_ids[:-1]
    rows = forward_with_hooks(llama, fed, {"x": ("model.layers.0", "output")})["x"]
    torch.testing.assert_close(
        fourth.captured.tensors["layers.0.resid_post"][0], rows[6:].mean(0), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(("max_tokens", "rows"), [(1, 3), (2, 4), (12, 14)])
def test_row_counts(engine: TransformersEngine, llama: LoadedModel, max_tokens: int, rows: int) -> None:
    """N tokens take N forwards; the last one sampled never passes through the model."""
    (result,) = run(
        engine, [Call(PROMPTS[0], Sampling(max_tokens, temperature=0), plan(llama, "resid_post", layers=(1,)))]
    )
    assert len(result.token_ids) == max_tokens
    assert result.captured is not None
    assert len(result.captured.tensors["layers.1.resid_post"]) == rows


def test_a_policy_that_selects_nothing_gives_no_rows(engine: TransformersEngine, llama: LoadedModel) -> None:
    for policy in ("generated", "mean_generated"):
        asked = plan(llama, "resid_post", layers=(1,), positions=policy)
        (result,) = run(engine, [Call(PROMPTS[0], Sampling(1, temperature=0), asked)])
        assert result.captured is not None
        assert result.captured.tensors["layers.1.resid_post"].shape == (0, 32)


def test_captured_rows_own_their_memory(engine: TransformersEngine, llama: LoadedModel) -> None:
    """A view would keep the whole batch's rows alive."""
    asked = plan(llama, "resid_post", layers=(1,))
    for result in run(engine, [Call(p, GREEDY, asked) for p in PROMPTS]):
        assert result.captured is not None
        rows = result.captured.tensors["layers.1.resid_post"]
        assert rows.untyped_storage().nbytes() == rows.nbytes


def test_a_seed_gives_the_same_tokens_in_any_company(engine: TransformersEngine) -> None:
    hot = Sampling(max_tokens=12, temperature=1.0, seed=7)
    (alone,) = run(engine, [Call(PROMPTS[1], hot)])
    together = run(
        engine, [Call(PROMPTS[0], Sampling(12, seed=1)), Call(PROMPTS[1], hot), Call(PROMPTS[2], Sampling(3, seed=7))]
    )
    assert together[1].token_ids == alone.token_ids
    assert run(engine, [Call(PROMPTS[1], Sampling(12, seed=8))])[0].token_ids != alone.token_ids


def test_logprobs_are_the_models_own(engine: TransformersEngine, llama: LoadedModel) -> None:
    (result,) = run(engine, [Call(PROMPTS[0], Sampling(6, temperature=0.5, seed=3))])
    tokens = PROMPTS[0] + result.token_ids
    with torch.inference_mode():
        logits = llama.observed._module(input_ids=torch.tensor([tokens])).logits[0]
    expected = torch.log_softmax(logits[2:-1], -1).gather(1, torch.tensor(result.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor([score.logprob for score in result.scores]), expected, rtol=1e-4, atol=1e-4)


def test_eos_ends_a_generation_and_counts(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = generate_alone(llama, PROMPTS[1], 12)
    monkeypatch.setattr(llama.observed._module.generation_config, "eos_token_id", expected[4])
    engine = TransformersEngine(llama)
    (result,) = run(engine, [Call(PROMPTS[1], GREEDY, plan(llama, "resid_post", layers=(0,)))])
    engine.close()
    stop = expected.index(expected[4])
    assert result.finish_reason == "stop"
    assert result.token_ids == expected[: stop + 1]
    assert result.captured is not None
    assert len(result.captured.position) == len(PROMPTS[1]) + stop


def test_streamed_pieces_join_to_the_text(engine: TransformersEngine) -> None:
    calls = [Call(prompt, GREEDY, stream=True) for prompt in PROMPTS]
    for call, result in zip(calls, run(engine, calls), strict=True):
        assert "".join(e.text for e in call.events if isinstance(e, TextDelta)) == result.text


def test_a_stop_string_ends_a_generation_and_is_not_in_the_text(engine: TransformersEngine) -> None:
    (free,) = run(engine, [Call(PROMPTS[1], GREEDY)])
    stop = free.text[3:5]
    call = Call(PROMPTS[1], Sampling(12, temperature=0, stop=(stop,)), stream=True)
    (result,) = run(engine, [call])
    assert result.finish_reason == "stop"
    assert result.text == free.text[: free.text.find(stop)]
    assert "".join(e.text for e in call.events if isinstance(e, TextDelta)) == result.text


@contextmanager
def slowed(model: LoadedModel, seconds: float) -> Iterator[None]:
    handle = model.observed._module.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    try:
        yield
    finally:
        handle.remove()


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_a_cancelled_job_leaves_and_the_others_go_on(engine: TransformersEngine, llama: LoadedModel) -> None:
    with slowed(llama, 0.03):
        gone = Call(PROMPTS[0], Sampling(100, temperature=0), stream=True)
        stays = Call(PROMPTS[1], GREEDY, plan(llama, "resid_post", layers=(0,)))
        for call in (gone, stays):
            engine.submit(call.job)
        wait_for(lambda: bool(gone.events))
        gone.job.cancelled.set()
        result = stays.result()
    assert result.token_ids == generate_alone(llama, PROMPTS[1], 12)
    assert all(isinstance(event, TextDelta) for event in gone.events)
    assert len(gone.events) < 50


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_requests_join_and_leave_a_running_batch(architecture: str) -> None:
    """Whatever the company, each request's tokens and rows are those it would have alone."""
    model = tiny.loaded(architecture)
    engine = TransformersEngine(model, max_batch=3)
    asked = plan(model, "resid_post")
    lengths = [(3, 40), (25, 4), (9, 12), (1, 30), (40, 2), (6, 20), (2, 9), (17, 17)]
    prompts = [[(7 * i + j) % 250 for j in range(n)] for i, (n, _) in enumerate(lengths)]
    calls = [
        Call(p, Sampling(m, temperature=0), asked if i % 2 else None, stream=True)
        for i, (p, (_, m)) in enumerate(zip(prompts, lengths, strict=True))
    ]
    with slowed(model, 0.005):
        engine.submit(calls[0].job)
        wait_for(lambda: bool(calls[0].events))  # it runs; the others arrive while it does
        results = [*run(engine, calls[1:4]), *run(engine, calls[4:])]
        results.insert(0, calls[0].result())
    engine.close()
    blocks = {f"layers.{i}.resid_post": (f"{layer_path(model)}.{i}", "output") for i in range(3)}
    for prompt, (_, max_tokens), result in zip(prompts, lengths, results, strict=True):
        assert result.token_ids == generate_alone(model, prompt, max_tokens)
        if result.captured is not None:
            expected = forward_with_hooks(model, prompt + result.token_ids[:-1], blocks)
            for key, rows in result.captured.tensors.items():
                error = (rows - expected[key]).norm(dim=1) / expected[key].norm(dim=1)
                assert error.max() <= 1e-4, key


def test_a_request_does_not_wait_for_a_long_one_to_end(engine: TransformersEngine, llama: LoadedModel) -> None:
    with slowed(llama, 0.02):
        long = Call(PROMPTS[0], Sampling(100, temperature=0), stream=True)
        engine.submit(long.job)
        wait_for(lambda: bool(long.events))
        run(engine, [Call(PROMPTS[1], Sampling(2, temperature=0))])
        assert not any(isinstance(event, Finished) for event in long.events)
        long.result()


def test_one_prefill_is_bounded(llama: LoadedModel) -> None:
    shapes: list[tuple[int, ...]] = []
    handle = llama.observed._module.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    engine = TransformersEngine(llama, max_prefill_tokens=20)
    run(engine, [Call([1] * n, Sampling(3, temperature=0)) for n in (6, 6, 6, 30, 2)])
    engine.close()
    handle.remove()
    # A prompt longer than the bound is read in pieces.
    assert [shape for shape in shapes if shape[1] > 1] == [(3, 6), (1, 20), (1, 10), (1, 2)]


def test_a_failed_forward_fails_its_jobs_and_not_the_engine(engine: TransformersEngine, llama: LoadedModel) -> None:
    def explode(*_: Any) -> None:
        raise RuntimeError("out of luck")

    handle = llama.observed._module.register_forward_pre_hook(explode)
    broken = [Call(prompt, GREEDY, plan(llama, "resid_post", layers=(0,))) for prompt in PROMPTS]
    for call in broken:
        engine.submit(call.job)
    for call in broken:
        with pytest.raises(RuntimeError, match="out of luck"):
            call.result()
    handle.remove()
    assert run(engine, [Call(PROMPTS[0], GREEDY)])[0].token_ids == generate_alone(llama, PROMPTS[0], 12)


def test_a_hook_point_without_rows_fails_alone(engine: TransformersEngine, llama: LoadedModel) -> None:
    """A list of layers never runs, so it has no row per token to keep."""
    odd = Call(PROMPTS[0], GREEDY, plan(llama, "resid_post", "model.layers.output"))
    fine = Call(PROMPTS[1], GREEDY, plan(llama, "resid_post"))
    for call in (odd, fine):
        engine.submit(call.job)
    assert fine.result().token_ids == generate_alone(llama, PROMPTS[1], 12)
    with pytest.raises(UncapturableError, match=r"model\.layers\.output has no row per token"):
        odd.result()


def test_a_failed_prefill_fails_alone(engine: TransformersEngine, llama: LoadedModel) -> None:
    def explode(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape[1] == 9:
            raise RuntimeError("out of luck")

    handle = llama.observed._module.register_forward_pre_hook(explode, with_kwargs=True)
    with slowed(llama, 0.01):
        running = Call(PROMPTS[0], Sampling(30, temperature=0), stream=True)
        engine.submit(running.job)
        wait_for(lambda: bool(running.events))
        with pytest.raises(RuntimeError, match="out of luck"):
            run(engine, [Call(PROMPTS[1], GREEDY)])
        result = running.result()
    handle.remove()
    assert result.token_ids == generate_alone(llama, PROMPTS[0], 30)


def test_a_full_queue_is_refused_and_a_closed_engine_says_so(llama: LoadedModel) -> None:
    engine = TransformersEngine(llama, max_batch=1, max_queue=1)
    with slowed(llama, 0.05):
        running = Call(PROMPTS[0], Sampling(100, temperature=0), stream=True)
        engine.submit(running.job)
        wait_for(lambda: bool(running.events))
        waiting = [Call(PROMPTS[0], GREEDY) for _ in range(2)]
        for call in waiting:
            engine.submit(call.job)
        with pytest.raises(EngineBusyError):
            engine.submit(Call(PROMPTS[0], GREEDY).job)
        engine.close()
    for call in (running, *waiting):
        assert isinstance(call.events[-1], Failed)
        assert isinstance(call.events[-1].error, EngineStoppedError)
    with pytest.raises(EngineStoppedError):
        engine.submit(Call(PROMPTS[0], GREEDY).job)
