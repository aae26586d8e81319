"""Models with other caches than keys and values: they generate like transformers, or are rejected when loaded."""

from typing import Any

import pytest
import torch
from torch import Tensor

from serve_app.capture.resolver import resolve_structure
from serve_app.engines.protocol import Sampling
from serve_app.engines.transformers.engine import TransformersEngine
from serve_app.engines.transformers.kv_cache import cache_tensors, select_rows
from serve_app.engines.transformers.model_cache import inspect_cache
from serve_app.models.architecture import UnsupportedModelError
from serve_app.replica.model_slot import as_load_error
from tests.serve_app import tiny
from tests.serve_app.alone import generate_alone, plan
from tests.serve_app.tiny import Call, run

PROMPTS = [[5, 6, 7], [10, 11, 12, 13, 14, 15, 16, 17, 18], [40], [3, 1, 4, 1, 5, 9]]
CPU = torch.device("cpu")


@pytest.mark.parametrize("architecture", ["bloom", "mpt", "mamba", "mamba2", "rwkv", "lfm2", "nanochat"])
def test_what_is_generated_together_is_what_transformers_generates_alone(architecture: str) -> None:
    """They end at different times, so rows are dropped from whatever cache there is."""
    model = tiny.loaded(architecture)
    engine = TransformersEngine(model)
    lengths = (12, 4, 9, 2)
    asked = plan(model, "resid_post", "final_norm", layers=(0,))
    calls = [Call(p, Sampling(n, temperature=0), asked) for p, n in zip(PROMPTS, lengths, strict=True)]
    results = run(engine, calls)
    engine.close()
    for prompt, length, result in zip(PROMPTS, lengths, results, strict=True):
        assert result.token_ids == generate_alone(model, prompt, length)
        fed = torch.tensor([prompt + result.token_ids[:-1]])
        seen: list[Tensor] = []
        norm = model.observed._module.get_submodule(model.structure.taps["final_norm"].module)
        handle = norm.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output[0].clone()))
        with torch.inference_mode():
            model.observed._module(input_ids=fed, use_cache=False)
        handle.remove()
        assert result.captured is not None
        torch.testing.assert_close(result.captured.tensors["final_norm"], seen[-1], rtol=1e-3, atol=1e-4)


def test_what_each_model_is_found_to_keep() -> None:
    found = {name: inspect_cache(tiny.module(name), CPU) for name in ("llama", "gemma2", "mamba", "rwkv", "lfm2")}
    assert {name: one.argument for name, one in found.items()} == {
        "llama": "past_key_values",
        "gemma2": "past_key_values",
        "mamba": "cache_params",
        "rwkv": "state",
        "lfm2": "past_key_values",
    }
    assert {name for name, one in found.items() if one.continuous} == {"llama", "gemma2"}
    assert {name for name, one in found.items() if one.alone} == {"rwkv"}
    assert found["llama"].token_bytes == 3 * 2 * 2 * 8 * 4
    assert (found["llama"].sequence_bytes, found["mamba"].token_bytes) == (0, 0)
    assert found["mamba"].sequence_bytes > 0


def test_a_model_without_a_cache_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="OpenAIGPTLMHeadModel keeps no cache of past tokens") as caught:
        TransformersEngine(tiny.loaded("openai-gpt"))
    error = as_load_error(caught.value)
    assert (error.status, error.param, error.code) == (400, "model_id", "model_unsupported")


def test_a_model_that_forgets_is_refused() -> None:
    """Its forward takes a cache, fills it, and does not read it."""
    model = tiny.module("llama")
    for layer in model.model.layers:

        def forward(
            *args: object, past_key_values: object = None, own: object = layer.self_attn.forward, **kw: object
        ) -> Any:
            if past_key_values is not None:
                own(*args, past_key_values=past_key_values, **kw)
            kw["attention_mask"] = None
            return own(*args, past_key_values=None, **kw)

        layer.self_attn.forward = forward
    with pytest.raises(UnsupportedModelError, match="has other logits with its cache than without"):
        inspect_cache(model, CPU)


def test_a_cache_of_another_shape_is_refused() -> None:
    """A state for all sequences together cannot be split by row."""
    model = tiny.module("lfm2")
    own = model.forward

    def forward(*args: object, **kw: object) -> Any:
        output = own(*args, **kw)
        if output.past_key_values is not None:
            output.past_key_values.all_of_them = torch.zeros(7, 5)
        return output

    forward.__signature__ = __import__("inspect").signature(own)
    model.forward = forward
    with pytest.raises(UnsupportedModelError, match=r"of shape \[7, 5\] for 3 sequences"):
        inspect_cache(model, CPU)


def test_a_state_that_a_module_keeps_is_found_and_thinned_out() -> None:
    """A running sum per sequence, kept in a module and not in the cache; the next request must not see it."""
    model = tiny.module("llama")
    layer = model.model.layers[1]
    own = layer.forward

    def forward(hidden_states: Tensor, *args: object, **kw: object) -> Tensor:
        if hidden_states.shape[1] > 1 or getattr(layer, "total", None) is None:
            layer.total = torch.zeros_like(hidden_states[:, 0])
        mixed = layer.total[:, None] + hidden_states.cumsum(1)
        layer.total = mixed[:, -1].clone()
        return own(hidden_states + 0.3 * mixed, *args, **kw)

    layer.forward = forward
    found = inspect_cache(model, CPU)
    assert not found.continuous
    assert (layer, "total") in found.modules


def test_taking_rows_of_a_cache_takes_them_everywhere() -> None:
    class Odd:
        def __init__(self) -> None:
            self.keys = torch.arange(6.0).view(3, 2)
            self.values = self.keys
            self.more = {"a": [torch.arange(3)], "n": 4, "pair": (torch.zeros(3, 1), None)}

    odd = Odd()
    assert select_rows(odd, torch.tensor([2, 0]), 3) is odd
    assert odd.keys.tolist() == [[4, 5], [0, 1]]
    assert odd.values is odd.keys
    assert odd.more["a"][0].tolist() == [2, 0]
    assert [tuple(tensor.shape) for tensor in cache_tensors(odd)] == [(2, 2), (2,), (2, 1)]


def test_a_norm_that_runs_twice_is_read_where_it_is_last() -> None:
    structure = resolve_structure(tiny.module("nanochat"), "nanochat")
    assert (structure.taps["final_norm"].module, structure.taps["final_norm"].run) == ("model.norm", 1)
    assert resolve_structure(tiny.module("llama"), "llama").taps["final_norm"].run is None
