"""Products by packed weights against plain ones, and the cases that must not use the packed copy."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from serve_app.engines.transformers.packed_weights import PackedLinear, pack_weights
from tests.serve_app import tiny

PLENTY = 1 << 40


def _layer(dtype: torch.dtype = torch.float32, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(96, 40, bias=bias, dtype=dtype)
    pack_weights(nn.Sequential(layer), PLENTY)
    return layer


def _plain(layer: nn.Linear, rows: torch.Tensor) -> torch.Tensor:
    bias = layer.bias.double() if layer.bias is not None else None
    return nn.functional.linear(rows.double(), layer.weight.double(), bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 96), (7, 1, 96), (3, 33, 96), (96,), (0, 96), (2, 0, 96)])
def test_the_same_as_a_product_in_double_precision(dtype: torch.dtype, bias: bool, shape: tuple[int, ...]) -> None:
    layer, rows = _layer(dtype, bias=bias), torch.randn(shape).to(dtype)
    with torch.inference_mode():
        found = layer(rows)
        expected = _plain(layer, rows)
    assert found.shape == expected.shape
    assert found.dtype == dtype
    rounding = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize(
    "view",
    [lambda x: x[:, -1:], lambda x: x.transpose(0, 1), lambda x: x[::2], lambda x: x[:1].expand(4, -1, -1)],
    ids=["last column", "transposed", "every second", "expanded"],
)
def test_rows_need_not_lie_together(view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    layer, rows = _layer(), view(torch.randn(4, 6, 96))
    with torch.inference_mode():
        torch.testing.assert_close(layer(rows).double(), _plain(layer, rows), rtol=1e-5, atol=1e-5)


def _in_place(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight.mul_(2)


def _in_place_in_inference_mode(layer: nn.Linear) -> None:
    with torch.inference_mode():
        layer.weight.mul_(2)


def _other_values(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.data * 2


def _other_parameter(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach() * 2)


def _loaded(layer: nn.Linear) -> None:
    layer.load_state_dict({"weight": layer.weight.detach() * 2, "bias": layer.bias.detach()})


@pytest.mark.parametrize("change", [_in_place, _in_place_in_inference_mode, _other_values, _other_parameter, _loaded])
def test_a_changed_weight_is_packed_again(change: Callable[[nn.Linear], None]) -> None:
    layer, rows = _layer(), torch.randn(5, 96)
    with torch.inference_mode():
        before = layer(rows).clone()
    change(layer)
    with torch.inference_mode():
        torch.testing.assert_close(layer(rows).double(), _plain(layer, rows), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(layer(rows), before)


def test_outside_inference_mode_plain_weights_compute() -> None:
    layer, rows = _layer(), torch.randn(5, 96, requires_grad=True)
    assert isinstance(layer, PackedLinear)
    layer._packed = torch.empty(0)  # what would fail if it were taken
    layer(rows).sum().backward()
    assert rows.grad is not None
    assert layer.weight.grad is not None
    with torch.no_grad():
        layer(rows)


def test_a_function_mode_sees_a_linear_layer() -> None:
    layer, seen = _layer(), list[object]()

    class Watching(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with torch.inference_mode(), Watching():
        layer(torch.ones(2, 96))
    assert nn.functional.linear in seen


def test_a_copy_from_elsewhere_packs_its_own_weights() -> None:
    layer, rows = _layer(), torch.randn(5, 96)
    again = pickle.loads(pickle.dumps(layer))
    with torch.inference_mode():
        torch.testing.assert_close(again(rows), layer(rows))


def test_a_whole_model_gives_the_same_logits_and_keeps_its_tied_embedding() -> None:
    model, tokens = tiny.module("llama").eval(), torch.arange(1, 12)[None]
    with torch.inference_mode():
        expected = model(tokens).logits
        assert pack_weights(model, PLENTY)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    assert model.get_output_embeddings().weight.shape == model.get_input_embeddings().weight.shape


def test_too_large_copies_are_not_made() -> None:
    model = tiny.module("llama")
    assert pack_weights(model, 1000) == 0
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_other_kinds_of_layers_stay_as_they_are() -> None:
    class Own(nn.Linear):
        pass

    class Quantized(torch.Tensor):
        """As torchao's weights are."""

    theirs = nn.Linear(4, 4)
    theirs.weight = nn.Parameter(theirs.weight.detach().as_subclass(Quantized), requires_grad=False)
    model = nn.Sequential(Own(4, 4), nn.Linear(4, 4, dtype=torch.float64), nn.Embedding(3, 4), theirs)
    assert pack_weights(model, PLENTY) == 0
    assert [type(module) for module in model] == [Own, nn.Linear, nn.Embedding, nn.Linear]
