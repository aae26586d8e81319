"""One request that fails, in each way there is, and neighbours in its batch that must not notice."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from roentgen.contract import Positions
from serve_app.capture.rows import CapturePlan, UncapturableError
from serve_app.capture.steering import SteeringVector, UnsteerableError
from serve_app.capture.structure import Tap
from serve_app.engines.protocol import GenerationJob, Sampling, UnknownTokenError
from serve_app.engines.transformers.engine import MAX_DEAD_FORWARDS, TransformersEngine
from serve_app.engines.transformers.loaded_model import LoadedModel
from tests.serve_app import tiny
from tests.serve_app.alone import generate_alone, plan
from tests.serve_app.tiny import Call, run

GREEDY = Sampling(max_tokens=8, temperature=0)
HEALTHY = [[5, 6, 7], [40], [3, 1, 4, 1, 5, 9]]
CURSED = 200
"""A token that makes the model raise."""


@contextmanager
def cursed(model: LoadedModel, *, steps: bool = False) -> Iterator[None]:
    """Have the model raise when the token passes through it; with `steps`, only where it is read with others before it."""

    def explode(module: Any, args: Any, kwargs: Any) -> None:
        tokens, mask = kwargs["input_ids"], kwargs["attention_mask"]
        if (tokens == CURSED).any() and not (steps and tokens.shape[1] == mask.shape[1] and tokens.shape[1] > 1):
            raise RuntimeError("the token is cursed")

    handle = model.observed._module.register_forward_pre_hook(explode, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def asked(model: LoadedModel) -> CapturePlan:
    return plan(model, "resid_post", "final_norm", layers=(1,))


def check(model: LoadedModel, call: Call, prompt: list[int]) -> None:
    """A healthy request has its tokens, and the rows of a lone forward."""
    result = call.result()
    assert result.token_ids == generate_alone(model, prompt, GREEDY.max_tokens)
    assert result.captured is not None
    seen: list[torch.Tensor] = []
    layer = model.observed._module.get_submodule(f"{model.structure.layers_path}.1")
    handle = layer.register_forward_hook(
        lambda module, args, output: seen.append((output[0] if isinstance(output, tuple) else output)[0].clone())
    )
    with torch.inference_mode():
        model.observed._module(input_ids=torch.tensor([prompt + result.token_ids[:-1]]), use_cache=False)
    handle.remove()
    rows = result.captured.tensors["layers.1.resid_post"]
    assert result.captured.position.tolist() == list(range(len(rows)))
    torch.testing.assert_close(rows, seen[0].reshape(-1, rows.shape[1]), rtol=1e-4, atol=1e-4)


@pytest.fixture(params=["llama", "lfm2"])
def model(request: pytest.FixtureRequest) -> LoadedModel:
    """A model whose requests join and leave, and one that runs in static batches."""
    return tiny.loaded(request.param)


def test_a_prompt_that_fails_fails_alone(model: LoadedModel) -> None:
    engine = TransformersEngine(model)
    with cursed(model):
        calls = [Call(prompt, GREEDY, asked(model)) for prompt in (*HEALTHY, [9, CURSED, 9])]
        for call in calls:
            engine.submit(call.job)
        with pytest.raises(RuntimeError, match="cursed"):
            calls[3].result()
        for call in calls[:3]:
            call.result()
    engine.close()
    for call, prompt in zip(calls[:3], HEALTHY, strict=True):
        check(model, call, prompt)


def test_a_step_that_fails_fails_the_request_that_causes_it(model: LoadedModel) -> None:
    """Its first token is forced, so it is read in the first step, together with the others'."""
    engine = TransformersEngine(model)
    forced = Sampling(8, temperature=0, logit_bias={CURSED: 100.0})
    with cursed(model, steps=True):
        calls = [Call(prompt, GREEDY, asked(model)) for prompt in HEALTHY]
        calls.insert(1, Call([9, 8], forced, asked(model)))
        for call in calls:
            engine.submit(call.job)
        with pytest.raises(RuntimeError, match="cursed"):
            calls[1].result()
        healthy = [calls[0], *calls[2:]]
        for call in healthy:
            call.result()
    engine.close()
    for call, prompt in zip(healthy, HEALTHY, strict=True):
        check(model, call, prompt)


def test_bad_requests_one_after_the_other_do_not_end_the_engine(engine: TransformersEngine, llama: LoadedModel) -> None:
    with cursed(llama):
        for _ in range(MAX_DEAD_FORWARDS + 1):
            with pytest.raises(RuntimeError, match="cursed"):
                run(engine, [Call([CURSED], GREEDY)])
        assert run(engine, [Call(HEALTHY[0], GREEDY)])[0].token_ids
    assert engine.alive


def odd_plans(model: LoadedModel) -> dict[str, CapturePlan]:
    """Plans that cannot be captured: a module that runs twice or never, has no row per token, or has no such tensor."""

    def one(tap: Tap) -> CapturePlan:
        return CapturePlan({str(tap): tap}, Positions.parse("all"), "model")

    return {
        "runs more than once in a forward": one(Tap("model.norm", "output")),
        r"model\.layers\.output has no row per token": one(Tap("model.layers", "output")),
        r"mlp\.input\[3\] has no row per token": one(Tap("model.layers.0.mlp", "input", index=3)),
        "cannot be reached": one(Tap("model.nowhere", "output")),
    }


def test_a_hook_that_cannot_be_cut_fails_its_request_only() -> None:
    model = tiny.loaded("nanochat")
    engine = TransformersEngine(model)
    for _ in range(2):  # more failures than the engine would bear, were they its own
        plans = odd_plans(model)
        bad = [Call([7, 8, 9, n], Sampling(100, temperature=0), odd) for n, odd in enumerate(plans.values())]
        good = [Call(prompt, GREEDY, asked(model)) for prompt in HEALTHY]
        for call in (*bad, *good):
            engine.submit(call.job)
        for call, reason in zip(bad, plans, strict=True):
            with pytest.raises(UncapturableError, match=reason):
                call.result()
        for call, prompt in zip(good, HEALTHY, strict=True):
            check(model, call, prompt)
    assert engine.alive
    engine.close()


@pytest.mark.parametrize("mistake", [ValueError("odd shapes"), MemoryError("no room")])
def test_a_visitor_that_raises_fails_its_request_only(
    engine: TransformersEngine, llama: LoadedModel, monkeypatch: pytest.MonkeyPatch, mistake: Exception
) -> None:
    from serve_app.capture import rows

    gather = rows._Cohort.gather

    def explode(self: Any, key: str, *args: Any) -> None:
        if key == "layers.2.resid_post":
            raise mistake
        gather(self, key, *args)

    monkeypatch.setattr(rows._Cohort, "gather", explode)
    bad = Call([7, 8], GREEDY, plan(llama, "resid_post", layers=(2,)))
    good = [Call(prompt, GREEDY, asked(llama)) for prompt in HEALTHY]
    for call in (bad, *good):
        engine.submit(call.job)
    with pytest.raises(UncapturableError, match=f"resid_post could not be read .*{mistake}"):
        bad.result()
    for call, prompt in zip(good, HEALTHY, strict=True):
        check(llama, call, prompt)


@pytest.mark.parametrize(
    "tap", [Tap("model.norm", "output"), Tap("model.rotary_emb", "output"), Tap("model.layers", "output")]
)
def test_steering_where_it_cannot_be_fails_its_request_only(tap: Tap) -> None:
    model = tiny.loaded("nanochat")
    engine = TransformersEngine(model)
    steering_vector = SteeringVector("odd", tap, torch.ones(32), Positions.parse("all"))
    steered = Call([7, 8, 9], GREEDY)
    steered.job = GenerationJob([7, 8, 9], GREEDY, steered._listen, steering=(steering_vector,))
    good = [Call(prompt, GREEDY, asked(model)) for prompt in HEALTHY]
    for call in (steered, *good):
        engine.submit(call.job)
    with pytest.raises(UnsteerableError, match="odd"):
        steered.result()
    for call, prompt in zip(good, HEALTHY, strict=True):
        check(model, call, prompt)
    engine.close()


@pytest.mark.parametrize("token", [-1, 257, 2**40])
def test_a_token_that_the_model_does_not_know_is_refused_before_it_joins(
    engine: TransformersEngine, token: int
) -> None:
    with pytest.raises(UnknownTokenError, match=rf"{token} is out of vocabulary; the model has 257 tokens, 0–256"):
        engine.submit(Call([1, token], GREEDY).job)


def test_a_listener_that_raises_does_not_stop_the_others(engine: TransformersEngine, llama: LoadedModel) -> None:
    def gone(event: object) -> None:
        raise RuntimeError("nobody listens")

    deaf = GenerationJob([7, 8], GREEDY, gone, stream=True)
    good = Call(HEALTHY[0], GREEDY, asked(llama))
    engine.submit(deaf)
    engine.submit(good.job)
    check(llama, good, HEALTHY[0])
