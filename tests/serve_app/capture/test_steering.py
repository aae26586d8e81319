"""Steering inside a batch against a plain PyTorch forward of one sequence with hooks that add out of place, and neighbours."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from roentgen.contract import ActivationRequest, Positions, split_key
from serve_app.capture.batch_layout import PaddedBatch
from serve_app.capture.steering import OversteeredError, SteeringVector, StepSteering
from serve_app.capture.structure import Tap
from serve_app.engines.protocol import Finished, Sampling
from serve_app.engines.transformers.engine import TransformersEngine
from serve_app.engines.transformers.loaded_model import LoadedModel
from tests.serve_app import tiny
from tests.serve_app.alone import layer_path, plan
from tests.serve_app.tiny import Call

# Where a hook point's steering vector is added by hand. What is added to `resid_mid` is added to what attention adds to it.
LLAMA = {
    "resid_pre": ("", "input"),
    "resid_mid": (".self_attn", "output"),
    "resid_post": ("", "output"),
    "attn_out": (".self_attn", "output"),
    "mlp_out": (".mlp", "output"),
    "ln_attn": (".input_layernorm", "output"),
    "ln_mlp": (".post_attention_layernorm", "output"),
}
GPT2 = LLAMA | {
    "resid_mid": (".attn", "output"),
    "attn_out": (".attn", "output"),
    "ln_attn": (".ln_1", "output"),
    "ln_mlp": (".ln_2", "output"),
}
# The convolutions of LFM2 keep a state, so it runs in static batches.
PLACES = {
    "llama": LLAMA,
    "qwen3": LLAMA,
    "gpt2": GPT2,
    "lfm2": {"resid_pre": ("", "input"), "resid_post": ("", "output")},
}
POSITIONS = ("all", "prompt", "generated", "last_prompt", "stride:2")


@dataclass(frozen=True)
class Steer:
    """One steering vector: at which hook point, and at which positions."""

    key: str
    positions: str
    vector: torch.Tensor

    def of(self, model: LoadedModel) -> SteeringVector:
        hook_point, layer = split_key(self.key)
        (tap,) = model.structure.resolve(ActivationRequest(layers=(layer or 0,), hook_points=(hook_point,))).values()
        return SteeringVector(self.key, tap, self.vector, Positions.parse(self.positions))


def steered(key: str, positions: str = "all", seed: int = 0, scale: float = 0.7) -> Steer:
    return Steer(key, positions, scale * torch.randn(32, generator=torch.Generator().manual_seed(seed)))


def forward_by_hand(
    model: LoadedModel, places: dict[str, tuple[str, str]], tokens: list[int], n_prompt: int, steers: list[Steer]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Run a sequence alone through plain transformers, adding with hooks; log-probabilities and every layer's output."""
    root = tiny.module(model.source.name.removeprefix("tiny-"))
    for steer in steers:
        rows = {"all": slice(None), "prompt": slice(n_prompt), "generated": slice(n_prompt, None),
                "last_prompt": slice(n_prompt - 1, n_prompt), "stride:2": slice(None, None, 2)}[steer.positions]  # fmt: skip
        steering_vector = torch.zeros(1, len(tokens), 32)
        steering_vector[:, rows] = steer.vector
        hook_point, layer = split_key(steer.key)
        path, side = places[hook_point]
        module = root.get_submodule(f"{layer_path(model)}.{layer}{path}")
        if side == "input":
            module.register_forward_pre_hook(lambda module, args, a=steering_vector: (args[0] + a, *args[1:]))
        else:
            module.register_forward_hook(lambda module, args, output, a=steering_vector: _added(output, a))
    seen: dict[str, torch.Tensor] = {}
    for layer, block in enumerate(root.get_submodule(layer_path(model))):

        def keep(module: Any, args: Any, output: Any, key: str = f"layers.{layer}.resid_post") -> None:
            seen[key] = (output[0] if isinstance(output, tuple) else output)[0]

        block.register_forward_hook(keep)
    with torch.inference_mode():
        logits = root(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return logits.log_softmax(-1), seen


def _added(output: Any, steering_vector: torch.Tensor) -> Any:
    return (output[0] + steering_vector, *output[1:]) if isinstance(output, tuple) else output + steering_vector


def run(engine: TransformersEngine, calls: list[Call], steers: list[list[Steer]], model: LoadedModel) -> list[Finished]:
    for call, own in zip(calls, steers, strict=True):
        call.job = replace(call.job, steering=tuple(steer.of(model) for steer in own))
    return tiny.run(engine, calls)


@pytest.mark.parametrize("architecture", PLACES)
@pytest.mark.parametrize("prefill", [0, 12])
def test_each_request_of_a_batch_is_steered_as_by_hand(architecture: str, prefill: int) -> None:
    """Every hook point and position policy, prompts of all lengths (also read in pieces), and one that is not steered."""
    model, places = tiny.loaded(architecture), PLACES[architecture]
    wanted = [
        *([steered(f"layers.{i % 3}.{name}", POSITIONS[i % 5], seed=i)] for i, name in enumerate(places)),
        [],
        [
            steered("layers.0.resid_post", seed=20),
            steered("layers.0.resid_post", "prompt", 21),
            steered("layers.2.resid_pre"),
        ],
    ]
    lengths = [3, 17, 1, 6, 2, 9, 30, 4, 11][: len(wanted)]
    prompts = [[(7 * i + j) % 250 for j in range(n)] for i, n in enumerate(lengths)]
    asked = plan(model, "resid_post")
    calls = [Call(p, Sampling(max_tokens=4 + i, temperature=0), asked) for i, p in enumerate(prompts)]
    engine = TransformersEngine(model, max_prefill_tokens=prefill)
    results = run(engine, calls, wanted, model)
    engine.close()
    for prompt, result, steers in zip(prompts, results, wanted, strict=True):
        fed = prompt + result.token_ids[:-1]
        logprobs, expected = forward_by_hand(model, places, fed, len(prompt), steers)
        chosen = logprobs[len(prompt) - 1 :]
        torch.testing.assert_close(
            torch.tensor([score.logprob for score in result.scores]), chosen.max(-1).values, rtol=1e-4, atol=1e-4
        )
        assert result.token_ids == chosen.argmax(-1).tolist()
        assert result.captured is not None
        for key, rows in result.captured.tensors.items():
            error = (rows - expected[key]).norm(dim=1) / expected[key].norm(dim=1)
            assert error.max() <= 1e-4, f"{key}: {error.max()}"
        if steers:
            plain, _ = forward_by_hand(model, places, fed, len(prompt), [])
            assert (plain - logprobs).abs().max() > 1e-3


@pytest.mark.parametrize("key", ["embed", "final_norm"])
def test_model_wide_hook_points(key: str) -> None:
    model = tiny.loaded("llama")
    steer = steered(key)
    engine = TransformersEngine(model)
    (result,) = run(engine, [Call([5, 6, 7], Sampling(4, temperature=0))], [[steer]], model)
    engine.close()
    root = tiny.module("llama")
    module = root.get_submodule({"embed": "model.embed_tokens", "final_norm": "model.norm"}[key])
    module.register_forward_hook(lambda module, args, output: output + steer.vector)
    with torch.inference_mode():
        logits = root(input_ids=torch.tensor([[5, 6, 7, *result.token_ids[:-1]]])).logits[0, 2:]
    assert result.token_ids == logits.argmax(-1).tolist()


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_neighbours_are_untouched_to_the_last_bit(architecture: str) -> None:
    model = tiny.loaded(architecture)
    engine = TransformersEngine(model)
    prompts = [[5, 6, 7], [10, 11, 12, 13, 14], [40]]
    sampling = Sampling(9, temperature=0, stop_token_ids=frozenset())

    def batch(steers: list[list[Steer]]) -> list[Finished]:
        return run(engine, [Call(p, sampling, plan(model, "resid_post")) for p in prompts], steers, model)

    plain = batch([[], [], []])
    among = batch([[], [steered("layers.0.resid_mid"), steered("layers.1.resid_post", "generated")], []])
    engine.close()
    assert [len(result.token_ids) for result in plain + among] == [9] * 6  # the batches had the same shapes throughout
    for before, after in ((plain[0], among[0]), (plain[2], among[2])):
        assert before.captured is not None
        assert after.captured is not None
        assert [score.logprob for score in before.scores] == [score.logprob for score in after.scores]
        assert all(torch.equal(rows, after.captured.tensors[key]) for key, rows in before.captured.tensors.items())
    assert [s.logprob for s in plain[1].scores] != [s.logprob for s in among[1].scores]


def test_an_addition_that_overflows_fails_alone() -> None:
    model = tiny.loaded("llama")
    engine = TransformersEngine(model)
    sampling = Sampling(5, temperature=1, seed=1)
    calls = [Call([5, 6, 7], sampling), Call([5, 6, 7], sampling)]
    steer = replace(steered("layers.0.resid_post"), vector=torch.full((32,), 3e38))
    calls[1].job = replace(calls[1].job, steering=(steer.of(model), steer.of(model)))
    for call in calls:
        engine.submit(call.job)
    assert not any(math.isnan(score.logprob) for score in calls[0].result().scores)
    with pytest.raises(OversteeredError, match="use a smaller scale"):
        calls[1].result()
    engine.close()


@pytest.fixture
def step() -> Callable[..., StepSteering]:
    def make(*positions: str) -> StepSteering:
        steering_vectors = tuple(
            SteeringVector("x", Tap("x", "output"), torch.tensor([1.0, 10.0]), Positions.parse(policy))
            for policy in positions
        )
        return StepSteering([steering_vectors, ()], [2, 2], PaddedBatch([range(2), range(3)], 3))

    return make


def test_a_value_is_changed_where_it_lies(step: Callable[..., StepSteering]) -> None:
    """A strided view, and flattened batch and token axes: everything that holds the storage sees the sum."""
    storage = torch.zeros(3, 2, 2)
    step("all", "last_prompt")("x", storage.transpose(0, 1))
    assert storage.transpose(0, 1)[0].tolist() == [[0, 0], [1, 10], [2, 20]]
    assert not storage.transpose(0, 1)[1].any()
    flat = torch.zeros(6, 2)
    step("prompt")("x", flat)
    assert flat[:, 0].tolist() == [0, 1, 1, 0, 0, 0]


def test_nothing_to_add_looks_nowhere_and_a_value_without_rows_is_an_error(step: Callable[..., StepSteering]) -> None:
    assert step("generated").taps == {}
    with pytest.raises(ValueError, match=r"x has the shape \[2, 5, 2\]: not a row of 2 values per token"):
        step("all")("x", torch.zeros(2, 5, 2))
