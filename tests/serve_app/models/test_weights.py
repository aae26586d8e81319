"""A model with foreign or missing weights is rejected by name; unused weights are ignored."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from safetensors.torch import load_file, save_file

from roentgen.store import Session
from serve_app.engines.transformers.loaded_model import load
from serve_app.models.errors import WeightsError
from serve_app.models.inspection import inspect_model
from serve_app.models.model_source import locate
from serve_app.models.weights import compare_headers, read_module
from tests.serve_app import tiny

Weights = dict[str, torch.Tensor]
Change = Callable[[Weights], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole")
    tiny.module("llama").save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def copied(folder: Path, to: Path, weights: Weights | None = None, **config: object) -> Path:
    """Copy a model with other weights, or another configuration."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    if weights is not None:
        save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    if config:
        described = json.loads((to / "config.json").read_text()) | config
        (to / "config.json").write_text(json.dumps(described))
    return to


def without(part: str) -> Change:
    return lambda weights: [weights.pop(key) for key in list(weights) if part in key]


def renamed(old: str, new: str) -> Change:
    return lambda weights: weights.update({k.replace(old, new): weights.pop(k) for k in list(weights) if old in k})


def added(**shapes: int) -> Change:
    return lambda weights: weights.update(
        {key.replace("__", "."): torch.full((n, n), 0.5) for key, n in shapes.items()}
    )


def another_layer(weights: Weights) -> None:
    weights.update({k.replace(".2.", ".3."): v.clone() for k, v in weights.items() if ".layers.2." in k})


WRONG: list[tuple[Change, str]] = [
    (
        without(".layers.1."),
        r"9 weights are missing and would be initialized randomly: model\.layers\.1\.input_layernorm\.weight, .* and 3 more$",
    ),
    (without("lm_head"), r"1 weight is missing and would be initialized randomly: lm_head\.weight$"),
    (without("model.norm"), r"1 weight is missing .*: model\.norm\.weight"),
    (
        renamed("model.", "language.model."),
        r"29 weights are missing .*model\.embed_tokens\.weight.* not part of the model",
    ),
    (renamed("model.", "net."), r"29 weights are missing"),
    (
        lambda weights: weights.update({"model.norm.weight": torch.ones(16)}),
        r"1 weight has another shape: model\.norm\.weight \(\[16\] stored, \[32\] in the model\)",
    ),
    (another_layer, r"9 weights are not part of the model: model\.layers\.3\.input_layernorm\.weight"),
    (added(model__layers__0__self_attn__q_norm__weight=8), r"1 weight is not part of the model: model.*q_norm"),
    (
        lambda weights: weights.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
        r"not part of the model: model\.layers\.0\.self_attn\.q_proj\.bias",
    ),
    (lambda weights: weights.update({"lm_head.bias": torch.ones(257)}), r"not part of the model: lm_head\.bias"),
    (
        added(base_model__model__model__layers__0__self_attn__q_proj__lora_A__weight=4),
        r"lora_A\.weight \(they are an adapter's",
    ),
    (
        added(model__layers__0__mlp__up_proj__weight_scale_inv=1),
        r"weight_scale_inv \(they look quantized: does config\.json lack its quantization_config",
    ),
]


@pytest.mark.parametrize(("change", "said"), WRONG, ids=range(len(WRONG)))
def test_weights_that_are_not_the_models_are_named(whole: Path, tmp_path: Path, change: Change, said: str) -> None:
    weights = load_file(whole / "model.safetensors")
    change(weights)
    folder = copied(whole, tmp_path / "wrong", weights)
    with pytest.raises(WeightsError, match=said):
        load(locate(str(folder)), "float32", "cpu", lambda _: None)
    # An engine that loads by itself is told the same, from headers alone.
    with pytest.raises(WeightsError, match=said):
        compare_headers(str(folder), "wrong", tr.AutoConfig.from_pretrained(folder))


def test_every_way_to_a_model_refuses_it(whole: Path, tmp_path: Path) -> None:
    weights = load_file(whole / "model.safetensors")
    without(".layers.1.")(weights)
    folder = copied(whole, tmp_path / "wrong", weights)
    with pytest.raises(WeightsError, match="9 weights are missing"):
        inspect_model(str(folder))
    # PyTorch's own format, whole and in shards.
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    for read in (lambda: load(locate(str(folder)), device="cpu"), lambda: headers(folder)):
        with pytest.raises(WeightsError, match="9 weights are missing"):
            read()
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00001-of-00001.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "pytorch_model-00001-of-00001.bin")}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for read in (lambda: load(locate(str(folder)), device="cpu"), lambda: headers(folder)):
        with pytest.raises(WeightsError, match="9 weights are missing"):
            read()
    with pytest.raises(WeightsError, match="9 weights are missing"):
        load(locate(str(folder)), device="cpu", device_map={"": "cpu"})


def headers(folder: Path) -> None:
    compare_headers(str(folder), folder.name, tr.AutoConfig.from_pretrained(folder))


@pytest.mark.parametrize(
    ("extra", "config"),
    [
        ({"model.layers.0.self_attn.rotary_emb.inv_freq": (4,)}, {}),
        ({"model.layers.3.mlp.up_proj.weight": (64, 32)}, {"num_nextn_predict_layers": 1}),
        ({"mtp.layers.0.input_layernorm.weight": (32,), "mtp.fc.weight": (2, 2)}, {}),
        ({"vision_tower.encoder.layers.0.mlp.fc1.weight": (4, 4), "multi_modal_projector.linear_1.weight": (4, 4)}, {}),
        ({"model.vision_tower.blocks.0.weight": (4, 4), "model.visual.merger.weight": (2, 2)}, {}),
        ({"score.weight": (2, 32), "v_head.summary.weight": (1, 32)}, {}),
    ],
)  # fmt: skip
def test_what_the_model_has_no_use_for_is_left_out_and_logged(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, extra: dict[str, Any], config: dict[str, Any]
) -> None:
    weights = load_file(whole / "model.safetensors") | {key: torch.ones(shape) for key, shape in extra.items()}
    folder = copied(whole, tmp_path / "more", weights, **config)
    headers(folder)
    with caplog.at_level(logging.INFO, "serve_app.models.weights"):
        model = read_module(str(folder), "more", dtype=torch.float32)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    if "inv_freq" not in next(iter(extra)):  # which transformers does not even mention
        assert all(key in caplog.text for key in extra)


def test_a_tied_head_is_not_missing_and_may_be_stored(tmp_path: Path) -> None:
    model = tiny.module("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    weights = load_file(tmp_path / "tied/model.safetensors")
    assert "lm_head.weight" not in weights
    headers(tmp_path / "tied")
    read_module(str(tmp_path / "tied"), "tied")
    head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(weights | head, tmp_path / "tied/model.safetensors", metadata={"format": "pt"})
    headers(tmp_path / "tied")
    read_module(str(tmp_path / "tied"), "tied")
    del weights["model.embed_tokens.weight"]
    save_file(weights, tmp_path / "tied/model.safetensors", metadata={"format": "pt"})
    for read in (headers, lambda folder: read_module(str(folder), "tied")):
        with pytest.raises(WeightsError, match=r"2 weights are missing .*lm_head\.weight, model\.embed_tokens\.weight"):
            read(tmp_path / "tied")


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "qwen2_moe", "bloom", "gemma3_text", "mixtral", "phi3"])
def test_weights_as_transformers_saves_them_are_the_models(tmp_path: Path, architecture: str) -> None:
    tiny.module(architecture).save_pretrained(tmp_path)
    headers(tmp_path)
    read_module(str(tmp_path), architecture)
    weights = load_file(tmp_path / "model.safetensors")
    least = min((key for key in weights if "expert" in key or ".1." in key), key=str)
    del weights[least]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for read in (headers, lambda folder: read_module(str(folder), architecture)):
        with pytest.raises(WeightsError, match=r"missing|another shape|converted"):
            read(tmp_path)


def test_damaged_files_are_named_before_anything_is_loaded(whole: Path, tmp_path: Path) -> None:
    folder = copied(whole, tmp_path / "torn")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for part, said in (
        (content[:-1000], "is damaged: its tensors need"),
        (b"torn", "no complete header"),
        (b"", "no complete"),
    ):
        file.write_bytes(part)
        with pytest.raises(WeightsError, match=said):
            locate(str(folder))
    file.unlink()
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / shards["a"]).write_bytes(content)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    with pytest.raises(WeightsError, match=r"names 1 missing files: model-00002-of-00002\.safetensors"):
        locate(str(folder))
    (folder / "model.safetensors.index.json").unlink()
    (folder / shards["a"]).rename(folder / "consolidated.safetensors")
    with pytest.raises(WeightsError, match=r"the folder has consolidated\.safetensors\)"):
        load(locate(str(folder)), device="cpu")


def test_a_quantization_that_is_not_installed_is_named(whole: Path, tmp_path: Path) -> None:
    for number, (described, said) in enumerate(
        (
            ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq and cannot be loaded here: .*optimum"),
            ({"quant_method": "spqr"}, "spqr and cannot be loaded here: .*GPU is required"),
            ({"quant_method": "nvfp4"}, "nvfp4 and cannot be loaded here: .*not supported yet"),
        )
    ):
        folder = copied(whole, tmp_path / str(number), quantization_config=described)
        with pytest.raises(WeightsError, match=f"is quantized with {said}"):
            load(locate(str(folder)), device="cpu")


def test_a_cast_that_loses_something_is_logged(whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_module(str(whole), "whole", dtype=torch.float32)
    assert not caplog.messages
    read_module(str(whole), "whole", dtype=torch.bfloat16)
    assert caplog.messages == ["whole: weights stored in float32 are computed in bfloat16, which loses precision"]


def test_the_store_never_sees_a_random_layer(whole: Path, tmp_path: Path) -> None:
    """`roentgen capture` ends before it writes."""
    from rich.console import Console

    from roentgen.workflows.capture_texts import CaptureError, capture
    from roentgen.workflows.command_settings import CaptureSettings

    weights = load_file(whole / "model.safetensors")
    without(".layers.1.")(weights)
    folder = copied(whole, tmp_path / "wrong", weights)
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"prompt": "hi", "completion": "you"}\n')
    settings = CaptureSettings(
        source=texts,
        model=str(folder),
        device="cpu",
        store=str(tmp_path / "s"),
        session="s",
        layers="all",
        hook_points=("resid_post",),
    )
    with pytest.raises(CaptureError, match="9 weights are missing"):
        capture(settings, Console(quiet=True), lambda _: None)
    with pytest.raises(Exception, match="not a session"):
        Session.open(tmp_path / "s/s")
