"""Linear layers whose weights are also held in the layout that oneDNN multiplies by, so that no product lays them out anew.

On a CPU most of a decoding step is products of a few rows by large weights. oneDNN reads a weight in blocks of its own; given a
plain matrix it copies it into them in every call, or takes a slower kernel. A packed copy is made once instead, as inductor
does when it freezes a graph. It needs no compiler and no compiled graph, so everything that hooks modules works as before.

The plain weights stay where they are: tied embeddings read them, and rows are verified against a forward that uses them.
Packed copies compute in inference mode only, which is how the engine runs; anything else takes the plain weights. A weight that
has been changed or replaced since is packed again. A change in place through `.data` cannot be seen, since PyTorch counts it
nowhere, so a model whose weights are handed to a script is unpacked (`unpack_weights`).
"""

import logging
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import has_torch_function_unary

log = logging.getLogger(__name__)

ROWS = 64
"""The number of rows that the layout is chosen for. It suits 1 to 256 rows within some per cent."""

SHARE = 0.25
"""Of the memory that is free, what packed copies may take."""


class PackedLinear(nn.Linear):
    """A linear layer with a packed copy of its weight beside the plain one. A loaded `nn.Linear` becomes one by its class."""

    _packed: Tensor
    _packed_from: tuple[int, int]

    def forward(self, input: Float[Tensor, "... width"]) -> Float[Tensor, "... outputs"]:
        """Multiply, by the packed copy where nothing is to be differentiated."""
        # A function mode, as `FixedShapes` is one, is to see a linear layer's product.
        if not torch.is_inference_mode_enabled() or not input.numel() or has_torch_function_unary(input):
            return super().forward(input)
        return multiply(input, self.packed, self.bias)

    @property
    def packed(self) -> Tensor:
        """The packed copy of the weight as it is now."""
        if self._packed_from != _state(self.weight):
            self.pack()
        return self._packed

    def pack(self) -> None:
        """Copy the weight as it is now."""
        self._packed_from = _state(self.weight)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), ROWS)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the packed copy out: its layout belongs to this machine."""
        return {name: value for name, value in vars(self).items() if name != "_packed"} | {"_packed_from": (0, -1)}


def multiply(
    rows: Float[Tensor, "... width"], packed: Tensor, bias: Float[Tensor, "outputs"] | None
) -> Float[Tensor, "... outputs"]:
    """Return rows times a packed weight."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(rows, packed, bias, "none", [], "")
    return product


def pack_weights(model: nn.Module, free_bytes: int) -> int:
    """Pack the weights of a model's linear layers, where that is possible and they fit.

    Args:
        model: on a CPU, or it is left as it is.
        free_bytes: the memory that is free; packed copies may take a share of it (`SHARE`).

    Returns:
        The bytes that the copies take, 0 for none.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear and _packable(module.weight)]
    size = sum(module.weight.nbytes for module in layers)
    if size > free_bytes * SHARE:
        log.info(
            "weights are not packed: copies would take %.1f GB of %.1f GB that are free", size / 1e9, free_bytes / 1e9
        )
        return 0
    for module in layers:
        module.__class__ = PackedLinear
        assert isinstance(module, PackedLinear)
        module.pack()
    if size:
        log.info("packed the weights of %d linear layers; the copies take %.2f GB", len(layers), size / 1e9)
    return size


def unpack_weights(model: nn.Module) -> None:
    """Give a model its plain linear layers back."""
    packed: list[nn.Module] = [module for module in model.modules() if isinstance(module, PackedLinear)]
    for module in packed:
        module.__class__ = nn.Linear
        del module._packed, module._packed_from


def _packable(weight: Tensor) -> bool:
    """Whether oneDNN multiplies by packed weights of this kind here."""
    if type(weight) not in (Tensor, nn.Parameter):  # of a model that comes quantized, which multiplies in its own way
        return False
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or weight.is_inference():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def _state(weight: Tensor) -> tuple[int, int]:
    """Return what differs once a weight has been changed in place, or its values lie elsewhere."""
    return weight._version, weight.data_ptr()
