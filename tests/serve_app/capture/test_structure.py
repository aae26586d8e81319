"""Requests are resolved into taps; errors name what the model does not have."""

import pytest

from roentgen.contract import ActivationRequest
from serve_app.capture.resolver import resolve_structure
from serve_app.capture.structure import CaptureRequestError, ModelStructure, Tap, ranges
from tests.serve_app import tiny


@pytest.fixture(scope="module")
def structure() -> ModelStructure:
    return resolve_structure(tiny.module("llama"), "tiny")


def test_the_seeds_names_get_canonical_keys(structure: ModelStructure) -> None:
    taps = structure.resolve(ActivationRequest(layers=(0, -1)))
    assert list(taps) == ["layers.0.ln_attn", "layers.2.ln_attn", "layers.0.ln_mlp", "layers.2.ln_mlp"]


def test_module_paths_relative_and_absolute(structure: ModelStructure) -> None:
    names = ("mlp.gate_proj.output", "model.norm.output", "model.layers.1.mlp.down_proj.input")
    taps = structure.resolve(ActivationRequest(layers=(1,), hook_points=names))
    assert taps == {
        "layers.1.mlp.gate_proj.output": Tap("model.layers.1.mlp.gate_proj", "output"),
        "final_norm": Tap("model.norm", "output"),  # canonical wherever it is spelled as a path
        "model.layers.1.mlp.down_proj.input": Tap("model.layers.1.mlp.down_proj", "input"),
    }


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"layers": (3,)}, "activations.layers", r"3 is out of range; tiny has layers 0–2 \(or \"all\"\)"),
        ({"layers": (-4,)}, "activations.layers", "-4 is out of range"),
        ({"layers": (0,), "hook_points": ("resid",)}, "activations.hook_points", "'resid' is not a hook point"),
        ({"layers": (0,), "hook_points": ("mlp.nothing.output",)}, "activations.hook_points", "not a hook point"),
        ({"layers": (0,), "hook_points": ("mlp.gate_proj",)}, "activations.hook_points", "ending in"),
    ],
)
def test_what_the_model_does_not_have_is_named(
    structure: ModelStructure, body: dict[str, object], param: str, message: str
) -> None:
    with pytest.raises(CaptureRequestError, match=message) as caught:
        structure.resolve(ActivationRequest.model_validate(body))
    assert caught.value.param == param


def test_a_missing_canonical_hook_point_says_why() -> None:
    structure = resolve_structure(tiny.module("gpt_neox"), "neox")
    with pytest.raises(CaptureRequestError, match="in parallel"):
        structure.resolve(ActivationRequest(layers=(0,), hook_points=("resid_mid",)))


@pytest.fixture(scope="module")
def experts() -> ModelStructure:
    return resolve_structure(tiny.module("deepseek_v3"), "experts")  # its first layer is dense


def test_all_layers_are_those_that_have_the_hook_point(experts: ModelStructure) -> None:
    names = ("router", "resid_mid", "mlp.gate.output", "mlp.shared_experts.output")
    keys = list(experts.resolve(ActivationRequest(layers="all", hook_points=names)))
    assert keys == [
        *("layers.1.router", "layers.2.router"),
        *("layers.0.resid_mid", "layers.1.resid_mid", "layers.2.resid_mid"),
        *("layers.1.mlp.shared_experts.output", "layers.2.mlp.shared_experts.output"),
    ]


def test_a_layer_that_does_not_have_it_is_refused_by_name(experts: ModelStructure) -> None:
    with pytest.raises(CaptureRequestError, match=r"no layers.0.router: its MLP is dense.* router is in layers 1–2$"):
        experts.resolve(ActivationRequest(layers=(0, 1), hook_points=("router",)))
    with pytest.raises(CaptureRequestError, match=r"'mlp.gate.output' is not a hook point .* inside model.layers.0"):
        experts.resolve(ActivationRequest(layers=(0, 1), hook_points=("mlp.gate.output",)))


def test_a_dense_model_has_no_router(structure: ModelStructure) -> None:
    with pytest.raises(CaptureRequestError, match="tiny has no router: not a mixture of experts"):
        structure.resolve(ActivationRequest(layers="all", hook_points=("router",)))


def test_one_norm_before_both_has_both_names_and_its_path_the_first() -> None:
    structure = resolve_structure(tiny.module("phi"), "phi")
    norm = Tap("model.layers.0.input_layernorm", "output")
    taps = structure.resolve(ActivationRequest(layers=(0,), hook_points=("ln_mlp", "ln_attn")))
    assert taps == {"layers.0.ln_mlp": norm, "layers.0.ln_attn": norm}
    request = ActivationRequest(layers=(0,), hook_points=("input_layernorm.output",))
    assert structure.resolve(request) == {"layers.0.ln_attn": norm}


def test_layer_numbers_are_written_as_ranges() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0–2, 5, 7–8"
    assert ranges([]) == ""
