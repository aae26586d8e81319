"""Hook points are found by value; each is checked here against the module that the architecture's source says it is."""

import pytest

from serve_app.capture.resolver import resolve_structure
from tests.serve_app import tiny

# Written from each architecture's source, not from what the resolver says.
EXPECTED = {
    "llama": {
        "resid_pre": "model.layers.0.input",
        "resid_mid": "model.layers.0.post_attention_layernorm.input",
        "resid_post": "model.layers.0.output",
        "attn_out": "model.layers.0.self_attn.output",
        "mlp_out": "model.layers.0.mlp.output",
        "ln_attn": "model.layers.0.input_layernorm.output",
        "ln_mlp": "model.layers.0.post_attention_layernorm.output",
        "embed": "model.embed_tokens.output",
        "final_norm": "model.norm.output",
    },
    # Names lie: post_attention_layernorm normalises attention's output here.
    "gemma2": {
        "resid_mid": "model.layers.0.pre_feedforward_layernorm.input",
        "attn_out": "model.layers.0.post_attention_layernorm.output",
        "mlp_out": "model.layers.0.post_feedforward_layernorm.output",
        "ln_mlp": "model.layers.0.pre_feedforward_layernorm.output",
    },
    "olmo2": {
        "resid_mid": "model.layers.0.mlp.input",
        "attn_out": "model.layers.0.post_attention_layernorm.output",
        "mlp_out": "model.layers.0.post_feedforward_layernorm.output",
    },
    "gpt2": {
        "resid_mid": "transformer.h.0.ln_2.input",
        "ln_attn": "transformer.h.0.ln_1.output",
        "mlp_out": "transformer.h.0.mlp.output",
        "embed": "transformer.wte.output",
        "final_norm": "transformer.ln_f.output",
    },
    "gpt_neox": {
        "attn_out": "gpt_neox.layers.0.attention.output",
        "mlp_out": "gpt_neox.layers.0.mlp.output",
        "ln_mlp": "gpt_neox.layers.0.post_attention_layernorm.output",
    },
}
MISSING = {"olmo2": {"ln_attn", "ln_mlp"}, "gpt_neox": {"resid_mid"}}


@pytest.mark.parametrize("architecture", EXPECTED)
def test_hook_points_are_the_modules_of_the_source(architecture: str) -> None:
    structure = resolve_structure(tiny.module(architecture), architecture)
    record = structure.record()
    assert {k: v for k, v in record["hook_points"].items() if k in EXPECTED[architecture]} == EXPECTED[architecture]
    assert set(record["missing"]) == MISSING.get(architecture, set())
    assert record["num_layers"] == 3


def test_the_record_has_the_seeds_fields() -> None:
    record = resolve_structure(tiny.module("llama"), "tiny").record()
    assert record["layer_access_pattern"] == "model.layers[i]"
    assert record["pre_attention_path"] == "model.layers.{i}.input_layernorm"
    assert record["pre_mlp_path"] == "model.layers.{i}.post_attention_layernorm"
    assert record["architecture"] == "LlamaForCausalLM"
