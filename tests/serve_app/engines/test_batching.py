"""Requests that must not share a forward do not, and each gets the same values as alone; without this rule they differ."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import transformers as tr
from torch import Tensor

from roentgen.contract import ActivationRequest, Positions
from serve_app.capture.rows import CapturePlan
from serve_app.engines.batching import Batching
from serve_app.engines.protocol import Finished, Sampling
from serve_app.engines.transformers.engine import TransformersEngine
from serve_app.engines.transformers.load_checks import CheckedModel
from serve_app.engines.transformers.loaded_model import LoadedModel
from serve_app.verification.reference import stock_attention
from tests.serve_app import tiny
from tests.serve_app.engines.transformers.test_load_checks import ReadsNeighbors

LIMIT = 16
PROMPTS = [[7, 8, 9], list(range(20, 33)), list(range(40, 62)), list(range(70, 86)), [5, 6], list(range(90, 127))]
"""Some stay below the limit, some cross it, one ends at it, some begin beyond it."""

NEW = 9


@pytest.fixture(scope="module")
def longrope() -> LoadedModel:
    return tiny.loaded_from(tiny.module("phi3_longrope"), tiny.tokenizer(), check=True)


@contextmanager
def serving(model: LoadedModel, **options: int) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(model, **options)
    try:
        yield engine
    finally:
        engine.close()


def plan(model: LoadedModel) -> CapturePlan:
    request = ActivationRequest(session_id="s", layers="all", hook_points=["resid_post", "attn_out"])
    return CapturePlan(model.structure.resolve(request), Positions.parse("all"), "model")


def captured(model: LoadedModel, prompts: list[list[int]], **options: int) -> list[Finished]:
    calls = [tiny.Call(prompt, Sampling(NEW, temperature=0), plan(model), stream=True) for prompt in prompts]
    with serving(model, **options) as engine:
        return tiny.run(engine, calls)


def forwarded(model: LoadedModel, fed: list[int]) -> dict[str, Tensor]:
    """Rows of a whole sequence in one forward of the bare model, by plain PyTorch hooks."""
    module, taps, seen = model.observed._module, plan(model).taps, {}

    def keep(key: str, output: Tensor | tuple[Tensor, ...]) -> None:
        seen[key] = (output if isinstance(output, Tensor) else output[0])[0].clone()

    handles = [
        module.get_submodule(tap.module).register_forward_hook(lambda m, a, output, key=key: keep(key, output))
        for key, tap in taps.items()
    ]
    with torch.inference_mode(), stock_attention(model):
        module(input_ids=torch.tensor([fed]), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def worst_error(model: LoadedModel, prompts: list[list[int]], results: list[Finished]) -> float:
    worst = 0.0
    for prompt, result in zip(prompts, results, strict=True):
        fed = prompt + result.token_ids[:-1]
        assert result.captured is not None
        assert result.captured.position.tolist() == list(range(len(fed)))
        for key, rows in forwarded(model, fed).items():
            worst = max(worst, float(((result.captured.tensors[key] - rows).norm(dim=1) / rows.norm(dim=1)).max()))
    return worst


def test_longrope_rows_and_tokens_are_those_of_each_request_alone(longrope: LoadedModel) -> None:
    assert longrope.batching == replace(longrope.batching, kind="one side of a limit", limit=LIMIT)
    results = captured(longrope, PROMPTS, max_prefill_tokens=48)
    module = longrope.observed._module
    for prompt, result in zip(PROMPTS, results, strict=True):
        # Without its cache: with it, transformers 5.19 forgets all earlier tokens at the limit.
        with stock_attention(longrope), torch.inference_mode():
            ids = torch.tensor([prompt])
            output = module.generate(ids, do_sample=False, max_new_tokens=NEW, use_cache=False)
        assert result.token_ids == output[0, len(prompt) :].tolist()
    assert worst_error(longrope, PROMPTS, results) < 1e-4


def test_without_the_limit_the_rows_are_wrong(longrope: LoadedModel) -> None:
    careless = replace(longrope, checks=CheckedModel())
    assert worst_error(careless, PROMPTS, captured(careless, PROMPTS)) > 1e-3


def test_a_stream_goes_on_where_it_was_when_its_tokens_are_read_again(longrope: LoadedModel) -> None:
    call = tiny.Call(PROMPTS[1], Sampling(NEW, temperature=0), plan(longrope), stream=True)
    with serving(longrope) as engine:
        result = tiny.run(engine, [call])[0]
    deltas = call.events[:-1]
    assert [token for delta in deltas for token in delta.token_ids] == result.token_ids


def test_requests_that_must_run_alone_do() -> None:
    model = tiny.loaded_from(ReadsNeighbors(tiny.config("llama")).eval(), tiny.tokenizer(), check=True)
    assert model.batching.kind == "alone"
    prompts = PROMPTS[:4]
    assert worst_error(model, prompts, captured(model, prompts)) < 1e-4
    careless = replace(model, checks=CheckedModel())
    assert worst_error(careless, prompts, captured(careless, prompts)) > 1e-3


def test_requests_of_one_length_share_a_forward() -> None:
    model = replace(tiny.loaded("llama"), checks=CheckedModel(batching=Batching("same length")))
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8, 9, 10], [11, 12, 13]]
    calls = [tiny.Call(prompt, Sampling(NEW, temperature=0), plan(model)) for prompt in prompts]
    with serving(model) as engine:
        results = tiny.run(engine, calls)
        assert set(engine.load.steps) == {3, 1}
    assert worst_error(model, prompts, results) < 1e-4


def test_a_request_does_not_depend_on_longer_ones_before_it() -> None:
    """Dynamic NTK scaling remembers the longest sequence."""
    architecture = tiny.config("llama")
    rotation = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    options = architecture.to_dict() | {"max_position_embeddings": 16, "rope_parameters": rotation}
    torch.manual_seed(0)
    weights = tr.LlamaForCausalLM(type(architecture)(**options)).eval()
    model = tiny.loaded_from(weights, tiny.tokenizer(), check=True)
    assert model.batching.kind == "same length"
    prompts = [list(range(20, 40)), list(range(40, 100))]
    forget = Sampling(0, temperature=0)
    calls = [tiny.Call(prompt, forget, plan(model)) for prompt in (prompts[0], prompts[1], prompts[0])]
    with serving(model) as engine:
        first, _, again = [tiny.run(engine, [call])[0] for call in calls]
    assert first.captured is not None
    assert again.captured is not None
    for key, rows in first.captured.tensors.items():
        torch.testing.assert_close(again.captured.tensors[key], rows)
