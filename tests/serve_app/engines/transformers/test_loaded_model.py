"""Loading: one copy of the weights, also when it is spread over devices that hold only parts of it."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from serve_app.config import ServerConfig
from serve_app.engines.protocol import Sampling
from serve_app.engines.transformers.engine import TransformersEngine
from serve_app.engines.transformers.loaded_model import load
from serve_app.models.model_source import ModelSource
from tests.serve_app import tiny
from tests.serve_app.alone import forward_with_hooks, generate_alone, plan
from tests.serve_app.tiny import Call, run

PROMPT = [10, 11, 12, 13]
PARTS = ("embed_tokens", "rotary_emb", "layers.0", "layers.1", "layers.2", "norm")


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    tiny.module("llama").save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    return ModelSource("tiny-llama", str(tmp_path), "0")


def test_a_folder_is_loaded_and_said_what_it_is(source: ModelSource) -> None:
    stages: list[str] = []
    model = load(source, "float32", "cpu", stages.append)
    assert model.structure.num_layers == 3
    assert (model.context_length, model.eos_token_ids) == (128, frozenset({256}))
    assert stages == [
        "loading tiny-llama (torch.float32, cpu)",
        "verifying hook points",
        "checking causality, attention and batching",
    ]


def test_a_model_split_over_memory_and_disk_generates_and_captures_the_same(source: ModelSource) -> None:
    split = {f"model.{part}": "disk" if part == "layers.1" else "cpu" for part in PARTS} | {"lm_head": "cpu"}
    model = load(source, "float32", "cpu", device_map=split)
    assert {p.device.type for p in model.observed._module.model.layers[1].parameters()} == {"meta"}  # not in memory
    engine = TransformersEngine(model)
    (result,) = run(engine, [Call(PROMPT, Sampling(8, temperature=0), plan(model, "resid_post"))])
    engine.close()
    whole = tiny.loaded("llama")
    assert result.token_ids == generate_alone(whole, PROMPT, 8)
    blocks = {f"layers.{i}.resid_post": (f"model.layers.{i}", "output") for i in range(3)}
    expected = forward_with_hooks(whole, PROMPT + result.token_ids[:-1], blocks)
    assert result.captured is not None
    for key, rows in result.captured.tensors.items():
        torch.testing.assert_close(rows, expected[key], rtol=1e-4, atol=1e-5)


def test_a_device_map_may_be_text() -> None:
    assert ServerConfig(device_map="auto").device_map == "auto"
    assert ServerConfig(device_map='{"model.layers.0": 0, "lm_head": "cpu"}').device_map == {
        "model.layers.0": 0,
        "lm_head": "cpu",
    }
    for wrong in ("everywhere", "{not json"):
        with pytest.raises(ValidationError, match="device_map"):
            ServerConfig(device_map=wrong)
