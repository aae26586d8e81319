"""Products by int8 weights against products in double precision; and a model of them against one of plain weights."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from serve_app.engines.transformers.engine import TransformersEngine
from serve_app.engines.transformers.int8_weights import FEW, PIECE, Int8Linear, dequantize_weights, quantize_weights
from serve_app.engines.transformers.loaded_model import load
from serve_app.models.errors import WeightsError
from serve_app.models.model_source import locate
from serve_app.verification import verify_capture
from tests.serve_app import tiny


def _made(
    dtype: torch.dtype, *, bias: bool = True, width: int = 96, outputs: int = 40
) -> tuple[nn.Linear, torch.Tensor]:
    """An int8 layer, and the weight that it was made of."""
    torch.manual_seed(0)
    layer = nn.Linear(width, outputs, bias=bias, dtype=dtype)
    weight = layer.weight.detach().clone()
    quantize_weights(nn.Sequential(layer), "m")
    return layer, weight


def _rounded(weight: torch.Tensor) -> torch.Tensor:
    """What int8 weights made of these stand for, in double precision: each output's largest is 127 steps."""
    steps = (weight.abs().amax(1) / 127).double().clamp_min(1e-30).numpy()[:, None]
    return torch.from_numpy(np.clip(np.rint(weight.double().numpy() / steps), -127, 127) * steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 96), (FEW, 1, 96), (3, 33, 96), (96,), (0, 96), (2, 0, 96)])
def test_the_same_as_a_product_in_double_precision(dtype: torch.dtype, bias: bool, shape: tuple[int, ...]) -> None:
    layer, weight = _made(dtype, bias=bias)
    rows = torch.randn(shape).to(dtype)
    expected = nn.functional.linear(rows.double(), _rounded(weight), layer.bias.double() if bias else None)
    rounding = 1e-5 if dtype == torch.float32 else 2e-2
    with torch.inference_mode():
        found = layer(rows)
    assert (found.shape, found.dtype) == (expected.shape, dtype)
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=rounding)
    torch.testing.assert_close(layer(rows).double(), expected, rtol=rounding, atol=rounding)  # the plain product


@pytest.mark.parametrize(
    "view",
    [lambda x: x[:, -1:], lambda x: x.transpose(0, 1), lambda x: x[::2], lambda x: x[:1].expand(4, -1, -1)],
    ids=["last column", "transposed", "every second", "expanded"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_need_not_lie_together(view: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> None:
    layer, weight = _made(dtype, bias=False)
    rows = view(torch.randn(4, 6, 96).to(dtype))
    with torch.inference_mode():
        found = layer(rows).double()
    torch.testing.assert_close(found, rows.double() @ _rounded(weight).T, rtol=2e-2, atol=2e-2)


def test_a_layer_larger_than_a_piece() -> None:
    width = 1000
    layer, _ = _made(torch.float32, width=width, outputs=2 * PIECE // width + 3)
    rows = torch.randn(FEW + 1, width)
    with torch.inference_mode():
        found = layer(rows).double()
    expected = nn.functional.linear(rows.double(), layer.weight.double(), layer.bias.double())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_is_off_by_half_a_step_at_most(dtype: torch.dtype) -> None:
    layer, weight = _made(dtype)
    assert isinstance(layer, Int8Linear)
    step = layer.scales.double()[:, None]
    # Beside half a step, what the largest weight loses where its scale was rounded down.
    allowed = step * (0.5 + 127 * torch.finfo(dtype).eps)
    assert ((layer.quantized.double() * step - weight.double()).abs() <= allowed).all()
    assert layer.quantized.abs().amax(1).min() >= 126


def test_an_output_without_weights_stays_zero_and_what_is_not_finite_is_refused() -> None:
    layer = nn.Linear(8, 2, bias=False)
    layer.weight.data[0] = 0
    quantize_weights(nn.Sequential(layer), "m")
    with torch.inference_mode():
        assert layer(torch.randn(3, 8))[:, 0].tolist() == [0, 0, 0]
    broken = nn.Sequential(nn.Linear(8, 2))
    broken[0].weight.data[1, 3] = float("inf")
    with pytest.raises(WeightsError, match="quantize: model 'm' has weights that are not finite: 0"):
        quantize_weights(broken, "m")
    with pytest.raises(WeightsError, match="quantize: model 'm' has no linear layers"):
        quantize_weights(nn.Sequential(nn.Embedding(4, 4)), "m")


def test_a_function_mode_sees_the_product() -> None:
    seen: list[Any] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    layer, _ = _made(torch.float32)
    with torch.inference_mode(), Watch():
        layer(torch.randn(2, 96))
    assert nn.functional.linear in seen


def test_what_reads_the_weight_itself_reads_numbers_of_the_models_dtype() -> None:
    layer, weight = _made(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    torch.testing.assert_close(layer.weight.double(), _rounded(weight), rtol=1e-2, atol=1e-3)
    before = layer.weight.clone()
    dequantize_weights(nn.Sequential(layer))
    assert type(layer) is nn.Linear
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_neox"])
def test_rows_are_those_of_a_plain_model_with_the_weights_that_int8_stands_for(architecture: str) -> None:
    """The engine with int8 weights, against transformers' own modules in float32, and against weights as they were."""
    weights, reference = tiny.module(architecture), tiny.module(architecture)
    quantize_weights(weights, "tiny")
    for module in reference.modules():
        if type(module) is nn.Linear:
            module.weight = nn.Parameter(_rounded(module.weight.detach()).float())
    model = replace(tiny.loaded_from(weights, tiny.tokenizer()), quantization="int8")
    report = verify_capture(model, unquantized=lambda: reference)
    assert report.problems == ()
    assert report.quantization is not None
    assert {d.key for d in report.quantization.deviations} == set(model.structure.taps)
    assert max(d.max_error for d in report.quantization.deviations) < 1e-5
    assert report.quantization.positions > 50
    assert report.quantization.mean_divergence < 1e-9

    effect = verify_capture(model, unquantized=lambda: tiny.module(architecture)).quantization
    assert effect is not None
    assert 1e-4 < max(d.mean_error for d in effect.deviations) < 0.1
    assert effect.mean_divergence > 1e-9


def test_a_tied_head_is_quantized_and_its_embedding_is_not() -> None:
    model = tiny.module("gemma2")
    embedding = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is embedding
    quantize_weights(model, "tiny")
    assert isinstance(model.get_output_embeddings(), Int8Linear)
    assert model.get_input_embeddings().weight is embedding
    assert embedding.dtype == torch.float32


def test_a_model_is_loaded_quantized_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.module("llama").save_pretrained(tmp_path / "m")
    tiny.tokenizer().save_pretrained(tmp_path / "m")
    plain, source = locate(str(tmp_path / "m")), locate(str(tmp_path / "m"), quantize="int8")
    assert source.revision == f"{plain.revision}-int8"
    with caplog.at_level(logging.INFO):
        model = load(source, "float32", "cpu")
    assert (model.quantization, load(plain, "float32", "cpu").quantization) == ("int8", None)
    layers = [module for module in model.observed._module.modules() if isinstance(module, nn.Linear)]
    assert layers
    assert all(isinstance(module, Int8Linear) for module in layers)
    assert f"quantized {len(layers)} linear layers to int8" in caplog.text
    assert model.checks.batching.kind == "any"

    engine = TransformersEngine(model)
    try:
        engine.expect_changed_weights()
        assert all(type(module) is nn.Linear for module in layers)
    finally:
        engine.close()


def test_what_comes_quantized_is_not_quantized_again(tmp_path: Path) -> None:
    tiny.module("llama").save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(WeightsError, match=r"is already quantized \(fp8\); leave out quantize"):
        load(locate(str(tmp_path), quantize="int8"), device="cpu")
    assert load(locate(str(tmp_path)), device="cpu").quantization == "fp8"
