"""Hook points are found by value; each is compared with the module that the architecture's source defines."""

from collections import defaultdict
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from roentgen.contract import LAYER_HOOK_POINTS, stored_key
from serve_app.capture.resolver import ResolutionError, resolve_structure
from serve_app.capture.structure import ModelStructure
from serve_app.capture.watching import first_tensor
from tests.serve_app import tiny

# Written from each architecture's source, not from what the resolver says.


def pre_norm(attention: str, mlp: str, ln_attn: str, ln_mlp: str) -> dict[str, str]:
    """x + attention(norm(x)), then that + mlp(norm(that))."""
    return {
        "resid_mid": f"{ln_mlp}.input",
        "attn_out": f"{attention}.output",
        "mlp_out": f"{mlp}.output",
        "ln_attn": f"{ln_attn}.output",
        "ln_mlp": f"{ln_mlp}.output",
    }


def parallel(attention: str, mlp: str, ln_attn: str, ln_mlp: str) -> dict[str, str]:
    """x + attention(norm(x)) + mlp(norm(x)), with one norm or two."""
    both = pre_norm(attention, mlp, ln_attn, ln_mlp)
    del both["resid_mid"]
    return both


LLAMA = pre_norm("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
GEMMA = {  # names lie: post_attention_layernorm normalises attention's output here
    "resid_mid": "pre_feedforward_layernorm.input",
    "attn_out": "post_attention_layernorm.output",
    "mlp_out": "post_feedforward_layernorm.output",
    "ln_attn": "input_layernorm.output",
    "ln_mlp": "pre_feedforward_layernorm.output",
}
LAYER = {
    "llama": LLAMA,
    "wide_llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen2_moe": LLAMA | {"router": "mlp.gate.output"},
    "qwen3": LLAMA,
    "qwen3_moe": LLAMA | {"router": "mlp.gate.output"},
    "mixtral": LLAMA | {"router": "mlp.gate.output"},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gpt2": pre_norm("attn", "mlp", "ln_1", "ln_2"),
    "gpt_neox": parallel("attention", "mlp", "input_layernorm", "post_attention_layernorm"),
    "gpt_neox_sequential": pre_norm("attention", "mlp", "input_layernorm", "post_attention_layernorm"),
    "gptj": parallel("attn", "mlp", "ln_1", "ln_1"),
    "phi": parallel("self_attn", "mlp", "input_layernorm", "input_layernorm"),
    "phi3": LLAMA,
    "phi3_longrope": LLAMA,
    "olmo2": {
        "resid_mid": "mlp.input",
        "attn_out": "post_attention_layernorm.output",
        "mlp_out": "post_feedforward_layernorm.output",
    },
    "olmoe": LLAMA | {"router": "mlp.gate.output"},
    "falcon": parallel("self_attention", "mlp", "input_layernorm", "input_layernorm"),
    "falcon_two_norms": parallel("self_attention", "mlp", "ln_attn", "ln_mlp"),
    "falcon_sequential": pre_norm("self_attention", "mlp", "input_layernorm", "post_attention_layernorm"),
    "stablelm": LLAMA,
    "stablelm_parallel": parallel("self_attn", "mlp", "input_layernorm", "input_layernorm"),
    "glm4": LLAMA | {"attn_out": "post_self_attn_layernorm.output", "mlp_out": "post_mlp_layernorm.output"},
    "gpt_oss": LLAMA | {"router": "mlp.router.output"},
    "opt": pre_norm("self_attn", "fc2", "self_attn_layer_norm", "final_layer_norm"),
    "opt_post_norm": {"resid_mid": "self_attn_layer_norm.input", "attn_out": "self_attn.output"},
    # Attention and MLP add the stream to their outputs by themselves.
    "bloom": pre_norm("self_attention.dense", "mlp.dense_4h_to_h", "input_layernorm", "post_attention_layernorm"),
    "cohere": parallel("self_attn", "mlp", "input_layernorm", "input_layernorm"),
    "granite": {k: v for k, v in LLAMA.items() if k not in ("attn_out", "mlp_out")},
    "smollm3": LLAMA,
    "deepseek_v3": LLAMA,
    "lfm2": pre_norm("self_attn", "feed_forward", "operator_norm", "ffn_norm"),
    "llama4_text": LLAMA | {"mlp_out": "feed_forward.output", "router": "feed_forward.router.output[1]"},
}
GPT = ("transformer.h", "transformer.wte", "transformer.ln_f")
NEOX = ("gpt_neox.layers", "gpt_neox.embed_in", "gpt_neox.final_layer_norm")
FALCON = ("transformer.h", "transformer.word_embeddings", "transformer.ln_f")
OPT = ("model.decoder.layers", "model.decoder.embed_tokens", "model.decoder.final_layer_norm")
AROUND = {  # path of the layers, of the embedding and of the last norm
    **dict.fromkeys(tiny.CONFIGS, ("model.layers", "model.embed_tokens", "model.norm")),
    **dict.fromkeys(("gpt2", "gptj"), GPT),
    **dict.fromkeys(("gpt_neox", "gpt_neox_sequential"), NEOX),
    **dict.fromkeys(("falcon", "falcon_two_norms", "falcon_sequential", "bloom"), FALCON),
    "opt": OPT,
    "opt_post_norm": (*OPT[:2], ""),
    "phi": ("model.layers", "model.embed_tokens", "model.final_layernorm"),
    "lfm2": ("model.layers", "model.embed_tokens", "model.embedding_norm"),
}
WHY = {
    "resid_mid": "its block adds attention and MLP to the residual stream in parallel",
    "router": "not a mixture of experts",
    ("olmo2", "ln_attn"): "no normalization layer was found between the residual stream and attention",
    ("olmo2", "ln_mlp"): "no normalization layer was found between the residual stream and the MLP",
    ("granite", "attn_out"): "its block adds 0.22 × the output of self_attn, which no module outputs",
    ("granite", "mlp_out"): "its block adds 0.22 × the output of mlp, which no module outputs",
    (
        "opt_post_norm",
        "mlp_out",
    ): "its block normalizes the residual stream itself, after the MLP's contribution is added",
    ("opt_post_norm", "ln_attn"): "no normalization layer was found between the residual stream and attention",
    (
        "opt_post_norm",
        "ln_mlp",
    ): "the MLP's contribution was not found, so neither was the normalization layer before it",
    ("opt_post_norm", "final_norm"): "no normalization layer was found after the last layer",
}


def expected(architecture: str) -> tuple[dict[str, str], dict[str, str]]:
    """What layer 1 (of 0 to 2) and the model have, and why they have no more."""
    layers, embed, final_norm = AROUND[architecture]
    points = {"resid_pre": f"{layers}.1.input", "resid_post": f"{layers}.1.output"}
    points |= {name: f"{layers}.1.{place}" for name, place in LAYER[architecture].items()}
    points |= {"embed": f"{embed}.output"} | ({"final_norm": f"{final_norm}.output"} if final_norm else {})
    if architecture == "deepseek_v3":
        points["router"] = f"{layers}.1.mlp.gate.output"
    absent = {name for name in (*LAYER_HOOK_POINTS, "final_norm") if name not in points}
    return points, {name: WHY.get((architecture, name)) or WHY[name] for name in absent}


@pytest.mark.parametrize("architecture", tiny.CONFIGS)
def test_hook_points_are_the_modules_of_the_source(architecture: str) -> None:
    model = tiny.module(architecture)
    structure = resolve_structure(model, architecture)
    points, missing = expected(architecture)
    own = {name: stored_key(name, 1) if name in LAYER_HOOK_POINTS else name for name in points}
    found = {name: str(tap) for name, key in own.items() if (tap := structure.taps.get(key))}
    assert found == points
    assert {name: why for name, why in structure.missing.items() if "." not in name} == missing
    assert (structure.num_layers, structure.d_model, structure.verified_on) == (3, model.config.hidden_size, "weights")


def read(model: PreTrainedModel, structure: ModelStructure) -> dict[str, Tensor]:
    """Every tap's value in one forward, read with plain PyTorch hooks, batch and tokens flattened."""
    values: dict[str, Tensor] = {}
    sides = defaultdict(list)
    for key, tap in structure.taps.items():
        sides[tap.module].append((key, tap.side, tap.index))

    def hook(module: nn.Module, args: object, kwargs: object, output: object = None, *, module_path: str) -> None:
        for key, side, place in sides[module_path]:
            if (output is None) == (side == "input"):
                value = first_tensor((args, kwargs) if side == "input" else output[place] if place else output)
                values[key] = value.detach().clone().reshape(-1, value.shape[-1])

    for path in sides:
        module = model.get_submodule(path)
        module.register_forward_pre_hook(partial(hook, module_path=path), with_kwargs=True)
        module.register_forward_hook(partial(hook, module_path=path), with_kwargs=True)
    with torch.inference_mode():
        model(input_ids=torch.tensor([[5, 6, 7, 8, 9], [100, 3, 200, 1, 0]]), use_cache=False)
    return values


@pytest.mark.parametrize("architecture", tiny.CONFIGS)
def test_the_values_read_add_up(architecture: str) -> None:
    model = tiny.module(architecture)
    structure = resolve_structure(model, architecture)
    v = read(model, structure)
    assert set(v) == set(structure.taps)
    for i in range(3):
        pre, mid, post, attn, mlp = (
            v.get(f"layers.{i}.{name}") for name in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
        )
        assert pre is not None
        assert post is not None
        if mid is not None and attn is not None:
            torch.testing.assert_close(mid, pre + attn)
        if mid is not None and mlp is not None:
            torch.testing.assert_close(post, mid + mlp)
        if mid is None and attn is not None and mlp is not None:
            torch.testing.assert_close(post, pre + attn + mlp)
        if i:
            torch.testing.assert_close(pre, v[f"layers.{i - 1}.resid_post"])


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3"])
def test_the_router_gives_logits_not_probabilities(architecture: str) -> None:
    model = tiny.module(architecture)
    structure = resolve_structure(model, architecture)
    values = read(model, structure)
    router = model.get_submodule(structure.taps["layers.2.router"].module)
    with torch.inference_mode():
        logits = functional.linear(values["layers.2.ln_mlp"], router.weight, getattr(router, "bias", None))
    assert logits.shape == (10, 6)
    torch.testing.assert_close(values["layers.2.router"], logits)


def test_a_mixture_of_experts_with_a_dense_layer_names_it() -> None:
    structure = resolve_structure(tiny.module("deepseek_v3"), "tiny")
    assert structure.missing == {"layers.0.router": "its MLP is dense, not a mixture of experts"}
    assert structure.locations("router") == {"model.layers.{i}.mlp.gate.output": [1, 2]}


def test_what_adds_up_nowhere_is_missing_and_the_other_layers_are_not() -> None:
    """Layer 1 scales each channel of its contributions; layer 2 adds something after its MLP that no module outputs."""
    model = tiny.module("llama")
    scaled, added = model.model.layers[1], model.model.layers[2]

    def forward(hidden_states: Tensor, **others: object) -> Tensor:
        attention, _ = scaled.self_attn(hidden_states=scaled.input_layernorm(hidden_states), **others)
        middle = hidden_states + attention * torch.linspace(0.5, 1.5, 32)
        return middle + scaled.mlp(scaled.post_attention_layernorm(middle)) * torch.linspace(0.5, 1.5, 32)

    scaled.forward = forward
    added.register_forward_hook(lambda module, args, output: output + 0.1 * torch.sin(output))
    missing = resolve_structure(model, "perturbed").missing
    nothing = "no module's output accounts for the residual stream"
    lost = "the MLP's contribution was not found, so neither was the normalization layer before it"
    assert missing == {
        "router": "not a mixture of experts",
        "layers.1.resid_mid": f"{nothing} after attention",
        "layers.1.attn_out": f"{nothing} after attention",
        "layers.1.mlp_out": f"{nothing} leaving the block",
        "layers.1.ln_mlp": lost,
        "layers.2.mlp_out": f"{nothing} leaving the block",
        "layers.2.ln_mlp": lost,
    }


def test_a_stream_between_attention_and_mlp_that_no_module_is_given() -> None:
    model = tiny.module("llama")
    model.model.layers[2].post_attention_layernorm.register_forward_pre_hook(lambda m, args: (args[0] * 1.1 + 0.3,))
    missing = resolve_structure(model, "perturbed").missing
    assert missing["layers.2.resid_mid"] == "no module takes it as its input"
    assert "layers.2.mlp_out" not in missing


def test_a_router_that_gives_probabilities_is_missing() -> None:
    model = tiny.module("mixtral")
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda m, args, output: (output[0].softmax(-1), *output[1:]))
    assert resolve_structure(model, "perturbed").missing == {
        "router": "no module outputs the linear projection to its 6 experts"
    }


def test_a_layer_used_twice_is_an_error() -> None:
    model = tiny.module("llama")
    model.model.layers[2] = model.model.layers[1]
    with pytest.raises(ResolutionError, match=r"model.layers.1 does not pass on a residual stream of its own"):
        resolve_structure(model, "perturbed")


def test_a_model_that_needs_more_than_tokens_is_an_error() -> None:
    model = tiny.module("llama")
    model.register_forward_pre_hook(lambda module, args: module.no_such_thing)
    with pytest.raises(ResolutionError, match=r"LlamaForCausalLM does not run on tokens alone.*no_such_thing"):
        resolve_structure(model, "perturbed")


def test_the_record_has_the_seeds_fields() -> None:
    record = resolve_structure(tiny.module("llama"), "tiny").record()
    assert record["layer_access_pattern"] == "model.layers[i]"
    assert record["pre_attention_path"] == "model.layers.{i}.input_layernorm"
    assert record["pre_mlp_path"] == "model.layers.{i}.post_attention_layernorm"
    assert record["architecture"] == "LlamaForCausalLM"
    assert record["hook_points"]["resid_mid"] == "model.layers.0.post_attention_layernorm.input"
    assert record["hook_point_layers"]["resid_mid"] == {"model.layers.{i}.post_attention_layernorm.input": [0, 1, 2]}
