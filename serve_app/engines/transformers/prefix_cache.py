"""Caches what was computed for earlier sequences, in blocks: keys and values, and captured rows.

Blocks are found by name alone (`prefix_blocks`), from the first block of a sequence. A block may lack the rows of a hook
point, because no request asked for them or because they were dropped. It then serves requests that need no rows there, and
gets the rows when its tokens are read again.

Keys and values lie on the model's device, and rows on the host, so each has a limit of its own. The least recently used block
is dropped first; of a sequence that was used as a whole, its end.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from serve_app.capture.structure import Tap


@dataclass(frozen=True)
class CacheLimits:
    """Limits of the cache, in bytes."""

    values: int
    """Limit of keys and values."""
    rows: int
    """Limit of captured rows."""


@dataclass(eq=False)
class Block:
    """Some tokens of a sequence."""

    values: list[Float[Tensor, "parts kv_heads tokens d"]]
    """Keys and values, grouped as by `KeyValues`."""
    rows: dict[Tap, Float[Tensor, "tokens ..."]] = field(default_factory=dict)
    """Captured rows, in the model's own dtype."""

    @property
    def value_bytes(self) -> int:
        """Bytes of its keys and values."""
        return sum(tensor.nbytes for tensor in self.values)

    @property
    def row_bytes(self) -> int:
        """Bytes of its rows."""
        return sum(tensor.nbytes for tensor in self.rows.values())


class PrefixCache:
    """Blocks by name (see the module). One thread changes it; any thread may read the numbers.

    Attributes:
        size: tokens of a block.
        value_bytes: bytes of keys and values.
        row_bytes: bytes of rows.
    """

    def __init__(self, size: int, room: CacheLimits) -> None:
        self.size = size
        self.value_bytes = self.row_bytes = 0
        self._room = room
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()  # the first was used longest ago

    def count(self, names: Sequence[bytes], needed: Callable[[range], Collection[Tap]]) -> int:
        """Return the number of leading blocks that are here with all that is needed of them.

        Args:
            names: names of a sequence's blocks.
            needed: returns, for the positions of a block, the taps whose rows are needed.
        """
        for number, name in enumerate(names):
            block = self._blocks.get(name)
            span = range(number * self.size, (number + 1) * self.size)
            if block is None or any(tap not in block.rows for tap in needed(span)):
                return number
        return len(names)

    def use(self, names: Sequence[bytes]) -> list[Block]:
        """Return a sequence's blocks, which must be here; they count as used now."""
        for name in reversed(names):
            self._blocks.move_to_end(name)
        return [self._blocks[name] for name in names]

    def lacks(self, name: bytes, taps: Collection[Tap]) -> set[Tap] | None:
        """Return the taps among `taps` that a block has no rows of; None if the block is not here."""
        block = self._blocks.get(name)
        return None if block is None else {tap for tap in taps if tap not in block.rows}

    def add(
        self,
        name: bytes,
        values: Callable[[], list[Tensor]],
        rows: dict[Tap, Float[Tensor, "tokens ..."]],
    ) -> None:
        """Add a block, or rows of a block that is here; nothing is dropped until `trim`.

        Args:
            name: its name.
            values: copies its keys and values, if they are needed.
            rows: its rows, in memory of their own.
        """
        block = self._blocks.get(name)
        if block is None:
            block = self._blocks[name] = Block(values())
            self.value_bytes += block.value_bytes
        before = block.row_bytes
        block.rows.update(rows)
        self.row_bytes += block.row_bytes - before

    def trim(self, names: Sequence[bytes] = (), room: CacheLimits | None = None) -> None:
        """Drop the least recently used blocks until the rest fits.

        Args:
            names: names of a sequence's blocks that count as used now.
            room: new limits, if they have changed.
        """
        self._room = room or self._room
        for name in reversed(names):
            if name in self._blocks:
                self._blocks.move_to_end(name)
        while self._blocks and self.value_bytes > self._room.values:
            _, block = self._blocks.popitem(last=False)
            self.value_bytes -= block.value_bytes
            self.row_bytes -= block.row_bytes
        for block in self._blocks.values():
            if self.row_bytes <= self._room.rows:
                break
            self.row_bytes -= block.row_bytes
            block.rows = {}

    def clear(self) -> None:
        """Drop everything."""
        self._blocks.clear()
        self.value_bytes = self.row_bytes = 0


class KeyValues:
    """The layout of layers' keys and values in blocks: tensors of one shape, dtype and device are stacked."""

    def __init__(self, layers: Sequence[CacheLayerMixin]) -> None:
        """Take the layout of a cache that has read some tokens."""
        self._n_layers = len(layers)
        groups: dict[object, list[tuple[int, str]]] = {}
        for number, layer in enumerate(layers):
            for side in ("keys", "values"):
                tensor = getattr(layer, side)
                if tensor is not None:  # a layer may share another's
                    kind = (tensor.shape[1], tensor.shape[3], tensor.dtype, tensor.device)
                    groups.setdefault(kind, []).append((number, side))
        self._groups = list(groups.values())

    def cut(
        self, layers: Sequence[CacheLayerMixin], row: int, columns: slice
    ) -> list[Float[Tensor, "parts kv_heads tokens d"]]:
        """Copy some columns of one row of a cache."""
        return [
            torch.stack([getattr(layers[number], side)[row, :, columns] for number, side in group])
            for group in self._groups
        ]

    def lay_out(self, rows: Sequence[tuple[Sequence[Block], int, int]], width: int) -> DynamicCache:
        """Copy blocks into a cache of `width` columns that a model continues with.

        Args:
            rows: per row its blocks, the tokens of them to use, and the columns of padding before them.
            width: columns.
        """
        cache = DynamicCache()
        cache.layers = [DynamicLayer() for _ in range(self._n_layers)]
        sample = next(blocks[0] for blocks, count, _ in rows if count)
        for place, group in enumerate(self._groups):
            like = sample.values[place]
            parts, heads, size, d = like.shape
            laid = like.new_zeros(parts, len(rows), heads, width, d)  # what is masked must not be a NaN
            for row, (blocks, count, padding) in enumerate(rows):
                for start, block in zip(range(0, count, size), blocks, strict=False):
                    stop = min(start + size, count)
                    laid[:, row, :, padding + start : padding + stop] = block.values[place][:, :, : stop - start]
            for part, (number, side) in enumerate(group):
                layer = cache.layers[number]
                if not layer.is_initialized:
                    layer.lazy_initialization(laid[part], laid[part])
                setattr(layer, side, laid[part])
        return cache
