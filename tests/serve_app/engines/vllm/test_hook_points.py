"""Candidates by name, and their verification on rows; vLLM is not needed for this."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from roentgen.contract import ActivationRequest
from serve_app.capture.structure import CaptureRequestError, ModelStructure, Tap
from serve_app.engines.vllm.hook_points import (
    CHECK,
    Verified,
    candidates,
    declared_taps,
    describe_modules,
    missing,
    split_locations,
    terms,
    verify,
)

LLAMA = (
    "",
    ".self_attn",
    ".self_attn.qkv_proj",
    ".mlp",
    ".mlp.gate_up_proj",
    ".input_layernorm",
    ".post_attention_layernorm",
)
GEMMA = (*LLAMA, ".pre_feedforward_layernorm", ".post_feedforward_layernorm")


def modules(inside: tuple[str, ...] = LLAMA, n_layers: int = 2) -> Any:
    paths = [f"model.layers.{i}{path}" for i in range(n_layers) for path in inside]
    packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    return describe_modules(["", "model", "model.embed_tokens", "model.layers", "model.norm", *paths], packed, "X")


def consistent(n_layers: int = 2) -> dict[str, torch.Tensor]:
    """Rows of a block whose modules are what their names say."""
    rows: dict[str, torch.Tensor] = {}
    stream = torch.randn(10, 8)
    rows["embed"] = stream.clone()
    for i in range(n_layers):
        attn, mlp, ln_attn, ln_mlp = (torch.randn(10, 8) for _ in range(4))
        middle = stream + attn
        names = {"resid_pre": stream, "resid_mid": middle, "resid_post": middle + mlp, "attn_out": attn, "mlp_out": mlp}
        names |= {"ln_attn": ln_attn, "ln_mlp": ln_mlp}
        rows |= {f"layers.{i}.{name}": values for name, values in names.items()}
        checks = {"ln_attn": stream, "attention": ln_attn, "mlp": ln_mlp}
        rows |= {f"{CHECK}layers.{i}.{name}": values for name, values in checks.items()}
        stream = middle + mlp
    rows["final_norm"], rows[CHECK + "final_norm"] = torch.randn(10, 8), stream
    return rows


def test_names_of_a_block_and_of_one_with_four_norms() -> None:
    taps, checks = candidates(modules())
    assert taps["layers.1.resid_mid"] == Tap("model.layers.1.post_attention_layernorm", "input", plus=1)
    assert taps["layers.1.ln_mlp"] == Tap("model.layers.1.post_attention_layernorm", "output")
    assert taps["layers.0.attn_out"] == Tap("model.layers.0.self_attn", "output")
    assert checks[CHECK + "layers.0.mlp"] == Tap("model.layers.0.mlp", "input")
    taps, _ = candidates(modules(GEMMA))
    assert taps["layers.1.resid_mid"] == Tap("model.layers.1.pre_feedforward_layernorm", "input", plus=1)
    assert taps["layers.0.attn_out"] == Tap("model.layers.0.post_attention_layernorm", "output")
    assert taps["layers.0.mlp_out"] == Tap("model.layers.0.post_feedforward_layernorm", "output")


def test_rows_that_add_up_hold() -> None:
    assert verify(consistent(), 2, None) == {f"layers.{i}.router": "not a mixture of experts" for i in range(2)}


@pytest.mark.parametrize(
    ("spoilt", "lost"),
    [
        ("layers.1.attn_out", {"layers.1.attn_out", "layers.1.resid_mid"}),
        ("layers.0.mlp_out", {"layers.0.mlp_out"}),
        ("layers.1.ln_attn", {"layers.1.ln_attn"}),
        ("layers.0.ln_mlp", {"layers.0.ln_mlp"}),
        (CHECK + "final_norm", {"final_norm"}),
        ("layers.1.resid_pre", {"layers.0.resid_post", "layers.1.attn_out", "layers.1.resid_mid", "layers.1.ln_attn"}),
    ],
)
def test_rows_that_do_not_add_up_are_missing(spoilt: str, lost: set[str]) -> None:
    rows = consistent()
    rows[spoilt] = rows[spoilt] + 0.1 * torch.randn(10, 8)
    wrong = verify(rows, 2, None)
    assert {key for key in wrong if not key.endswith("router")} == lost


def test_what_is_missing_everywhere_and_in_some_layers() -> None:
    taps, _ = candidates(modules())
    found, reasons = missing(taps, {"layers.0.attn_out": "a", "layers.0.ln_mlp": "b", "layers.1.ln_mlp": "c"}, 2)
    assert reasons == {"layers.0.attn_out": "a", "ln_mlp": "b; c"}
    assert "layers.1.attn_out" in found
    assert "layers.1.ln_mlp" not in found


def test_the_stream_is_the_sum_of_two_tensors_and_changed_in_the_first() -> None:
    positions, hidden, residual = torch.arange(3), torch.ones(3, 2), torch.full((3, 2), 5.0)
    tap = Tap("model.layers.0", "input", plus=1)
    first, second = terms(((positions, hidden, residual), {}), tap)
    assert first is hidden
    assert second is residual
    assert terms(((positions, hidden, None), {}), tap) == (hidden,)
    with pytest.raises(TypeError):
        terms((positions,), tap)


def structure() -> ModelStructure:
    found = modules()
    taps, _ = candidates(found)
    return ModelStructure("m", "llama", "X", 2, 8, found.layers_path, taps, {}, found.paths, fused=found.fused)


def test_a_layers_path_means_its_stream_and_what_is_fused_is_refused_by_name() -> None:
    taps = structure().resolve(
        ActivationRequest(layers=(1,), hook_points=("model.layers.0.output", "input_layernorm.output"))
    )
    assert taps == {
        "layers.0.resid_post": Tap("model.layers.0", "output", plus=1),
        "layers.1.ln_attn": Tap("model.layers.1.input_layernorm", "output"),
    }
    with pytest.raises(CaptureRequestError, match="computes up_proj together with others in gate_up_proj"):
        structure().resolve(ActivationRequest(layers=(1,), hook_points=("mlp.up_proj.output",)))


def test_taps_are_hook_points_stored_keys_or_paths() -> None:
    found, unknown = declared_taps(
        (
            "ln_mlp",
            "layers.1.resid_post",
            "final_norm",
            "model.layers.*.mlp.gate_up_proj.output",
            "resid",
            "a.b.output",
        ),
        modules(),
    )
    assert {key: str(tap) for key, tap in found.items()} == {
        "layers.0.ln_mlp": "model.layers.0.post_attention_layernorm.output",
        "layers.1.ln_mlp": "model.layers.1.post_attention_layernorm.output",
        "layers.1.resid_post": "model.layers.1.output[0] + [1]",
        "final_norm": "model.norm.output",
        "model.layers.0.mlp.gate_up_proj.output": "model.layers.0.mlp.gate_up_proj.output",
        "model.layers.1.mlp.gate_up_proj.output": "model.layers.1.mlp.gate_up_proj.output",
    }
    assert unknown == ["resid", "a.b.output"]


def test_the_default_taps_are_those_that_the_model_has() -> None:
    """The residual stream, and module paths that are no hook points; a norm with two names is tapped once."""
    found, unknown = declared_taps(("default", "layers.1.resid_mid"), modules())
    names = ("resid_post", "ln_attn", "ln_mlp")
    assert found.keys() == {f"layers.{i}.{name}" for i in range(2) for name in names} | {"layers.1.resid_mid"}
    assert unknown == []
    sandwiched, unknown = declared_taps(("default",), modules(GEMMA))
    assert str(sandwiched["layers.0.attn_out"]) == "model.layers.0.post_attention_layernorm.output"
    assert sandwiched.keys() >= {f"layers.{i}.ln_mlp" for i in range(2)}
    assert unknown == []


def test_a_path_that_is_a_hook_point_is_tapped_as_that() -> None:
    """The stream is passed in two parts there, whose sum is meant."""
    found, _ = declared_taps(("model.layers.*.output",), modules())
    assert found == {f"layers.{i}.resid_post": Tap(f"model.layers.{i}", "output", plus=1) for i in range(len(found))}


def test_a_path_may_be_inside_every_layer_or_one() -> None:
    every, _ = declared_taps(("mlp.gate_up_proj.output",), modules())
    one, _ = declared_taps(("layers.1.mlp.gate_up_proj.output",), modules())
    assert list(every) == [f"model.layers.{i}.mlp.gate_up_proj.output" for i in range(len(every))]
    assert list(one) == ["model.layers.1.mlp.gate_up_proj.output"]
    assert list(declared_taps(("input_layernorm.output",), modules())[0]) == ["layers.0.ln_attn", "layers.1.ln_attn"]


def test_what_has_no_tap_is_refused_with_what_adds_it() -> None:
    tapped = replace(structure(), tapped=frozenset({"model.layers.0.output"}), untapped="add it to --taps")
    assert len(tapped.resolve(ActivationRequest(layers=(0,), hook_points=("resid_post",)))) == 1
    with pytest.raises(CaptureRequestError, match=r"layers\.1\.resid_post: add it to --taps"):
        tapped.resolve(ActivationRequest(layers=(1,), hook_points=("resid_post",)))
    with pytest.raises(CaptureRequestError, match=r"mlp\.gate_up_proj\.output: add it to --taps"):
        tapped.resolve(ActivationRequest(layers=(0,), hook_points=("mlp.gate_up_proj.output",)))


def test_places_where_ranks_differ_are_split() -> None:
    first = {"whole": [1.0, 2.0], "rounded": [1.0, 2.0], "part": [1.0, 2.0], "zero": [0.0, 0.0], "silent there": [1.0]}
    second = {"whole": [1.0, 2.0], "rounded": [1.0002, 1.9998], "part": [1.0, 2.5], "zero": [0.0, 0.0]}
    assert split_locations([Verified({}, first)]) == frozenset()
    assert split_locations([Verified({}, first), Verified({}, second)]) == {"part", "silent there"}
    third = first | {"whole": [1.0, 2.0, 3.0]}
    assert split_locations([Verified({}, first), Verified({}, first), Verified({}, third)]) == {"whole"}


@pytest.mark.parametrize("name", ["mlp.gate_up_proj.output", "model.layers.1.mlp.gate_up_proj.output", "halves"])
def test_a_sharded_hook_point_is_rejected_under_every_alias(name: str) -> None:
    place = Tap("model.layers.1.mlp.gate_up_proj", "output")
    split = replace(structure(), split=frozenset({"model.layers.1.mlp.gate_up_proj.output"}))
    split = split.with_savepoints({"halves": place})
    with pytest.raises(CaptureRequestError, match=r"only some columns of model\.layers\.1\.mlp\.gate_up_proj\.output"):
        split.resolve(ActivationRequest(layers=(0, 1), hook_points=(name,)))
    assert len(split.resolve(ActivationRequest(layers=(0,), hook_points=("mlp.gate_up_proj.output",)))) == 1
    assert len(split.resolve(ActivationRequest(layers=(1,), hook_points=("mlp.gate_up_proj.input",)))) == 1
