"""Makes the rows of a decoding step independent of the batch, to the last bit.

A row of a batch has the same formula alone and among others, but not the same additions. The shape of a matrix product decides
which kernel runs and in what order it adds. Attention divides its columns, padding included, into blocks. An activation
function computes the last few numbers of a tensor by scalar instructions, which round differently. All three depend on the
number of rows and on a request's place among them.

`FixedShapes` is a mode in which they do not, while rows still run together:

- Matrix products take rows in tiles. The heights of tiles that give the same bits are measured for each weight's shape when it
  is first used, on the machine that computes; rows are padded with zeros to one of these heights.
- Attention runs row by row, over the row's own columns.
- Activation functions run row by row.

Everything else in a decoder is exact (additions, products, copies) or reduces one row at a time. `settle` verifies this on the
loaded model: after every layer, rows must have the same bits alone and among others. A model that fails, or that calls a
function the mode does not know, runs one request at a time.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

from serve_app.capture.resolver import number_of_experts
from serve_app.engines.transformers.kv_cache import SlotRows
from serve_app.engines.transformers.loaded_model import LoadedModel
from serve_app.engines.transformers.model_cache import CacheSupport

log = logging.getLogger(__name__)

PIECE = 128
"""Number of prompt tokens read at once; always the same number, of one prompt, so that shapes depend on the prompt only."""

HEIGHTS = (1, 2, 4, 8, 16, 32, 64)
"""Heights of tiles that are measured."""

TALL = 16
"""Smallest useful height of a tile: lower tiles read the weights too often."""

PROMPTS = tuple([1 + (7 * number + 3 * i) % 200 for i in range(length)] for number, length in enumerate((9, 41, 75)))
"""Token ids that a model is verified on: three rows of different lengths."""

LINEAR = {functional.linear, torch.addmm}
MATMUL = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm}
BATCHED = {torch.bmm, Tensor.bmm, torch.baddbmm, torch.einsum, torch.conv1d, functional.conv1d}
ACTIVATIONS = {
    functional.silu, functional.gelu, functional.mish, functional.softplus, functional.elu, functional.selu,
    functional.hardswish, torch.sigmoid, Tensor.sigmoid, functional.sigmoid, torch.tanh, Tensor.tanh, functional.tanh,
    torch.exp, Tensor.exp, torch.erf, Tensor.erf, torch.rsqrt, Tensor.rsqrt,
}  # fmt: skip


class FixedShapes(TorchFunctionMode):
    """Computes rows in shapes that do not depend on the batch (see the module).

    Attributes:
        unknown: names of called functions that it cannot make independent of the batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unknown: set[str] = set()
        self._heights: dict[tuple[Any, ...], tuple[int, ...]] = {}
        self._first: list[int] = []
        self._columns = 0
        self._masks: dict[int, list[Tensor | None]] = {}

    def step(self, mask: Int[Tensor, "rows columns"]) -> "FixedShapes":
        """Prepare for a step.

        Args:
            mask: 0 in columns of padding, which are on the left.
        """
        self._first = mask.argmax(-1).tolist()
        self._columns = mask.shape[1]
        self._masks = {}
        return self

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a PyTorch function, in fixed shapes if its rounding depends on them."""
        options = kwargs or {}
        if func in ACTIVATIONS and len(args[0]) == len(self._first) > 1:
            return torch.cat([func(row, *args[1:], **options) for row in args[0].split(1)])
        if func in LINEAR or (func in MATMUL and args[1].ndim == 2):
            return self._product(func, args, options)
        if func is functional.scaled_dot_product_attention:
            return self._attention(*args, **options)
        if func in BATCHED or (func in MATMUL and args[0].shape[-1] > 1):  # an outer product has no additions
            self.unknown.add(getattr(func, "__name__", str(func)))
        return func(*args, **options)

    def _product(self, func: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
        """Multiply rows by a weight, in tiles."""
        place = 1 if func is torch.addmm else 0
        rows, weight = args[place], args[place + 1]
        if rows.ndim < 2:
            whole: Tensor = func(*args, **options)
            return whole
        flat = rows.reshape(-1, rows.shape[-1])

        def product(tile: Tensor, weight: Tensor) -> Tensor:
            made: Tensor = func(*args[:place], tile, weight, *args[place + 2 :], **options)
            return made

        key = (func, weight.shape, weight.stride(), flat.dtype, flat.device, len(args), *options)
        if key not in self._heights:
            self._heights[key] = same_bits(product, *cancelling(flat, weight, transposed=func is functional.linear))
        heights = self._heights[key]
        tiles = [product(_filled(tile, heights), weight)[: len(tile)] for tile in flat.split(heights[-1])]
        return torch.cat(tiles).view(*rows.shape[:-1], -1)

    def _attention(
        self,
        query: Float[Tensor, "rows heads queries d"],
        key: Float[Tensor, "rows kv_heads columns d"],
        value: Float[Tensor, "rows kv_heads columns d"],
        attn_mask: Tensor | None = None,
        *rest: Any,
        **options: Any,
    ) -> Tensor:
        """Compute attention row by row, over each row's own columns."""
        attend = functional.scaled_dot_product_attention
        if len(query) != len(self._first) or key.shape[2] != self._columns:
            self.unknown.add("attention over columns that are not the cache's")
            return attend(query, key, value, attn_mask, *rest, **options)
        masks = [None] * len(query) if attn_mask is None else self._own(attn_mask)
        return torch.cat(
            [
                attend(query[row, None], key[row, None, :, first:], value[row, None, :, first:], mask, *rest, **options)
                for row, (first, mask) in enumerate(zip(self._first, masks, strict=True))
            ]
        )

    def _own(self, mask: Tensor) -> list[Tensor | None]:
        """Return the part of a mask for each row's own columns; None for a row without masked columns. Layers share masks."""
        if id(mask) not in self._masks:
            rows = mask.expand(len(self._first), *mask.shape[1:])
            own = [row[None, ..., first:] for row, first in zip(rows, self._first, strict=True)]
            self._masks[id(mask)] = [None if row.dtype == torch.bool and bool(row.all()) else row for row in own]
        return self._masks[id(mask)]


def _filled(tile: Float[Tensor, "rows d"], heights: Iterable[int]) -> Float[Tensor, "height d"]:
    """Pad a tile to the smallest of the heights that it fits, in aligned memory."""
    height = next(height for height in heights if height >= len(tile))
    if height == len(tile) and tile.is_contiguous() and tile.data_ptr() % 64 == 0:
        return tile
    filled = tile.new_zeros(height, tile.shape[1])
    filled[: len(tile)] = tile
    return filled


def cancelling(
    like: Float[Tensor, "rows d"], weight: Tensor, *, transposed: bool
) -> tuple[Float[Tensor, "height d"], Tensor]:
    """Return rows and a weight, like the given ones, whose products are exactly 0.

    The computed values are then the sum of the roundings. Many of them change with the order of additions, while the last
    rounding of an ordinary product in bfloat16 hides most changes.

    Args:
        like: rows of the same width, dtype and device.
        weight: the weight; its layout is kept.
        transposed: whether the weight's columns, not its rows, match the width of the rows.
    """
    random = torch.Generator().manual_seed(0)
    width = like.shape[1]
    order = torch.randperm(width, generator=random)
    first, second = order[: width // 2], order[width // 2 : width // 2 * 2]
    rows = torch.zeros(HEIGHTS[-1], width)
    rows[:, first] = torch.randn(HEIGHTS[-1], width // 2, generator=random)
    rows[:, second] = -rows[:, first]
    other = torch.empty_like(weight)
    values = torch.randn(width, weight.numel() // width, generator=random)
    values[second] = values[first]
    (other.mT if transposed else other).copy_(values)
    return rows.to(like), other


def same_bits(
    product: Callable[[Tensor, Tensor], Tensor], rows: Float[Tensor, "height d"], weight: Tensor
) -> tuple[int, ...]:
    """Measure which heights of a product's left side give every row the same bits, wherever the row lies.

    Args:
        product: multiplies rows and a weight.
        rows: of the greatest height.
        weight: the weight.

    Returns:
        The largest set of heights that agree, ascending; a set with a tall height is preferred.
    """
    sets: list[tuple[Tensor, list[int]]] = []
    for height in reversed(HEIGHTS):
        found = product(rows[:height].clone(), weight)
        if not torch.equal(product(rows[:height].flip(0), weight).flip(0), found):
            continue  # even in one shape, a row's bits depend on its place in the tile
        same = next((heights for most, heights in sets if torch.equal(most[:height], found)), None)
        if same is None:
            sets.append((found, [height]))
        else:
            same.append(height)
    if not sets:
        return (1,)
    _, heights = max(sets, key=lambda one: (one[1][0] >= TALL, len(one[1]), one[1][0]))
    return tuple(reversed(heights))


def settle(model: LoadedModel, cache_support: CacheSupport, max_batch: int) -> tuple[FixedShapes | None, str]:
    """Verify that a model's rows have the same bits alone and together.

    Args:
        model: loaded, and not running yet.
        cache_support: properties of its cache.
        max_batch: largest number of rows.

    Returns:
        The mode to decode in and ""; or None and the reason why requests must run one at a time.
    """
    if not cache_support.continuous:
        return None, "requests cannot join its cache"
    if model.batching.kind != "any":
        return None, model.batching.reason
    if number_of_experts(model.observed.config.get_text_config()):
        return None, "the number of tokens of each expert depends on the batch"
    shapes = FixedShapes()
    with torch.inference_mode():
        read = [_read(model, prompt) for prompt in PROMPTS]
        alone = [
            _step(model, shapes, read, [int(row == number) for row in range(len(read))]) for number in range(len(read))
        ]
        if shapes.unknown:
            return None, f"it calls {', '.join(sorted(shapes.unknown))}"
        for most in sorted({min(most, max_batch) for most in (2, 3, 5, max_batch)}):
            counts = [len(range(number, most, len(read))) for number in range(len(read))]
            together = _step(model, shapes, read, counts)
            numbers = [number for number, count in enumerate(counts) for _ in range(count)]
            for row, number in enumerate(numbers):
                if any(not torch.equal(one[0], many[row]) for one, many in zip(alone[number], together, strict=True)):
                    return None, f"row {row} of {most} does not have the same bits as alone"
    return shapes, ""


def _read(model: LoadedModel, prompt: list[int]) -> DynamicCache:
    """Read a prompt."""
    cache, tokens = SlotRows().new(), torch.tensor([prompt], device=model.device)
    model.observed._module(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        position_ids=torch.arange(len(prompt), device=model.device)[None],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return cache


def _step(model: LoadedModel, shapes: FixedShapes, read: list[DynamicCache], counts: list[int]) -> list[Tensor]:
    """Decode one token after each prompt, for `counts` copies of it; returns every layer's output and the logits."""
    module, device = model.observed._module, model.device
    rows = SlotRows()
    for prompt, cache, count in zip(PROMPTS, read, counts, strict=True):
        if count:
            rows.add(cache, [0] * count, [0], len(prompt))
    tokens = torch.tensor([[number + 1] for number, count in enumerate(counts) for _ in range(count)])
    mask, positions = rows.step_inputs()
    found: list[Tensor] = []

    def hook(_module: Any, _args: Any, output: Any) -> None:
        found.append((output if isinstance(output, Tensor) else output[0]).clone())

    layers = module.get_submodule(model.structure.layers_path)
    hooks = [layer.register_forward_hook(hook) for layer in layers]
    try:
        with shapes.step(mask):
            output = module(
                input_ids=tokens.to(device),
                attention_mask=mask.to(device),
                position_ids=positions.to(device),
                past_key_values=rows.cache,
                use_cache=True,
                logits_to_keep=1,
            )
    finally:
        for hook_handle in hooks:
            hook_handle.remove()
    return [*found, output.logits]
