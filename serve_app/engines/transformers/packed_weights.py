"""Linear layers with a second copy of their weights, in the layout that oneDNN multiplies by.

On a CPU most of the time of a decoding step goes into products of a few rows by large weights. oneDNN reads a weight in blocks
of its own layout. Given a plain matrix, it copies the matrix into that layout in every call, or uses a slower kernel. Here the
packed copy is made once, as inductor does when it freezes a graph. This needs neither a compiler nor a compiled graph, so
everything that hooks modules works as before.

The plain weights stay where they are: tied embeddings read them, and rows are verified against a forward that uses them.
Packed copies are used in inference mode only, which the engine uses; anything else uses the plain weights. A weight that has
been changed or replaced is packed again. PyTorch does not count an in-place change through `.data`, so a model whose weights
are given to a script is unpacked (`unpack_weights`).
"""

import logging
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import has_torch_function_unary

log = logging.getLogger(__name__)

ROWS = 64
"""Number of rows that the layout is chosen for. It suits 1 to 256 rows within some per cent."""

SHARE = 0.25
"""Largest share of the free memory that packed copies may take."""


class PackedLinear(nn.Linear):
    """A linear layer with a packed copy of its weight. A loaded `nn.Linear` is converted by changing its class."""

    _packed: Tensor
    _packed_from: tuple[int, int]

    def forward(self, input: Float[Tensor, "... width"]) -> Float[Tensor, "... outputs"]:
        """Multiply, by the packed copy in inference mode."""
        # A function mode such as `FixedShapes` must see the product of a linear layer.
        if not torch.is_inference_mode_enabled() or not input.numel() or has_torch_function_unary(input):
            return super().forward(input)
        return multiply(input, self.packed, self.bias)

    @property
    def packed(self) -> Tensor:
        """The packed copy of the current weight."""
        if self._packed_from != _state(self.weight):
            self.pack()
        return self._packed

    def pack(self) -> None:
        """Pack the current weight."""
        self._packed_from = _state(self.weight)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), ROWS)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the packed copy, whose layout belongs to this machine."""
        return {name: value for name, value in vars(self).items() if name != "_packed"} | {"_packed_from": (0, -1)}


def multiply(
    rows: Float[Tensor, "... width"], packed: Tensor, bias: Float[Tensor, "outputs"] | None
) -> Float[Tensor, "... outputs"]:
    """Return rows times a packed weight."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(rows, packed, bias, "none", [], "")
    return product


def pack_weights(model: nn.Module, free_bytes: int) -> int:
    """Pack the weights of a model's linear layers, if that is possible and they fit into memory.

    Args:
        model: on a CPU; on other devices it is not changed.
        free_bytes: free memory; packed copies may take a share of it (`SHARE`).

    Returns:
        The size of the copies in bytes; 0 if there are none.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear and _packable(module.weight)]
    size = sum(module.weight.nbytes for module in layers)
    if size > free_bytes * SHARE:
        log.info(
            "weights are not packed: copies would take %.1f GB of %.1f GB of free memory", size / 1e9, free_bytes / 1e9
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
    """Replace a model's packed layers by plain linear layers."""
    packed: list[nn.Module] = [module for module in model.modules() if isinstance(module, PackedLinear)]
    for module in packed:
        module.__class__ = nn.Linear
        del module._packed, module._packed_from


def _packable(weight: Tensor) -> bool:
    """Whether oneDNN supports packed weights of this kind on this machine."""
    if type(weight) not in (Tensor, nn.Parameter):  # a quantized model multiplies in its own way
        return False
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or weight.is_inference():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def _state(weight: Tensor) -> tuple[int, int]:
    """Return a value that changes when a weight is changed in place or moved."""
    return weight._version, weight.data_ptr()
