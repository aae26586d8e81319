"""Linear layers with int8 weights, for a CPU: one byte per weight, and one scale per output.

Weights are quantized symmetrically: `weight ≈ q · s`, where `s` is an output's largest weight divided by 127. Activations are
not quantized, so a request's rows do not depend on other requests. Embeddings, norms and everything that is not a linear layer
stay as they are. A head that is tied to the embedding gets int8 weights of its own.

The purpose is to save memory: there is neither a plain copy nor one in oneDNN's layout (`packed_weights`). Up to `FEW` rows in
half precision use PyTorch's int8 kernel, which reads half the bytes. For more rows, and for float32, for which the kernel has
no vector instructions, one piece of the weights at a time is converted to a matrix that stays in the processor's cache.

Both paths need inference mode, which the engine uses. Everything else, such as a reference that rows are verified against,
multiplies by `weight`, a plain matrix of `q · s` that is computed on access.
"""

import ctypes
import logging
import platform
import sys
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import has_torch_function_unary

from serve_app.models.errors import WeightsError

log = logging.getLogger(__name__)

LARGEST = 127
"""Largest int8 weight; -128 is not used."""

FEW = 8
"""Largest number of rows for which the int8 kernel is faster than a converted matrix."""

PIECE = 1 << 20
"""Number of weights that are converted at once."""


class Int8Linear(nn.Linear):
    """A linear layer with int8 weights. A loaded `nn.Linear` is converted by changing its class."""

    quantized: Tensor
    scales: Tensor
    _piece: Tensor

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weights as a plain matrix, computed on each access."""
        return self.quantized.to(self.scales.dtype) * self.scales[:, None]

    def forward(self, input: Float[Tensor, "... width"]) -> Float[Tensor, "... outputs"]:
        """Multiply, by int8 weights in inference mode."""
        # A function mode such as `FixedShapes` must see the product of a linear layer.
        is_plain = not torch.is_inference_mode_enabled() or has_torch_function_unary(input)
        if is_plain or not input.numel() or input.dtype != self.scales.dtype:
            return nn.functional.linear(input, self.weight, self.bias)
        rows = input.reshape(-1, self.in_features)
        if len(rows) <= FEW and input.dtype != torch.float32:
            output = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), self.quantized, self.scales)
        else:
            output = self._in_pieces(rows).mul_(self.scales)
        if self.bias is not None:
            output += self.bias
        shaped: Tensor = output.view(*input.shape[:-1], self.out_features)
        return shaped

    def _in_pieces(self, rows: Float[Tensor, "rows width"]) -> Float[Tensor, "rows outputs"]:
        """Multiply by `quantized`, one piece of its outputs at a time."""
        output = rows.new_empty(len(rows), self.out_features)
        height = max(1, len(self._piece) // self.in_features)
        for start in range(0, self.out_features, height):
            part = self.quantized[start : start + height]
            matrix = self._piece[: part.numel()].view(part.shape).copy_(part)
            output[:, start : start + height] = nn.functional.linear(rows, matrix)
        return output


def quantize_weights(model: nn.Module, name: str) -> None:
    """Quantize the weights of a model's linear layers to int8, in place; each plain weight is freed at once.

    Args:
        model: on a CPU, with plain weights.
        name: the model's name in errors.

    Raises:
        WeightsError: if it has no linear layers, or a weight that is not finite.
    """
    before = _size(model)
    layers = {path: module for path, module in model.named_modules() if type(module) is nn.Linear}
    if not layers:
        raise WeightsError(f"quantize: model {name!r} has no linear layers to quantize")
    pieces: dict[torch.dtype, Tensor] = {}
    quantized = 0
    for path, module in layers.items():
        weight = module.weight.detach()
        scales = (weight.abs().amax(1) / LARGEST).clamp_min(torch.finfo(weight.dtype).tiny)
        if not scales.isfinite().all():
            raise WeightsError(f"quantize: model {name!r} has weights that are not finite: {path}")
        del module.weight
        module.register_buffer("scales", scales)
        # Divide by the stored scales, which are rounded to the weights' dtype.
        rounded = (weight / scales[:, None]).round_().clamp_(-LARGEST, LARGEST)
        module.register_buffer("quantized", rounded.to(torch.int8))
        if len(pieces.get(weight.dtype, ())) < max(PIECE, module.in_features):
            pieces[weight.dtype] = torch.empty(max(PIECE, module.in_features), dtype=weight.dtype)
        quantized += weight.numel()
    for module in layers.values():
        module.__class__ = Int8Linear
        assert isinstance(module, Int8Linear)
        module._piece = pieces[module.scales.dtype]
    _give_back()
    log.info(
        "quantized %d linear layers to int8, %.0f %% of the model's weights; it takes %.2f GB of memory instead of %.2f GB",
        len(layers),
        100 * quantized / (quantized + sum(parameter.numel() for parameter in model.parameters())),
        _size(model) / 1e9,
        before / 1e9,
    )


def dequantize_weights(model: nn.Module) -> None:
    """Replace a model's int8 layers by plain linear layers with the same values."""
    layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, Int8Linear)]
    for module in layers:
        weight: Any = module.weight
        del module.quantized, module.scales, module._piece
        module.__class__ = nn.Linear
        module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))


def _give_back() -> None:
    """Return freed memory to the system: glibc keeps it between other blocks of its heap, here as much as was saved."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _size(model: nn.Module) -> int:
    """Return the size of a model's weights in bytes."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
