"""Holds the running batch's keys and values in slots that are filled in place.

transformers' dynamic cache grows by concatenation: every step copies the whole cache, and so does every request that joins or
leaves. Here each layer owns one slab for keys and one for values, and all layers share one `_Extent` that says how much of a
slab is in use:

    slab [slots, kv_heads, columns, d]

              0         low            high       columns
    row 0     ·         ·   start┌───────┤         │      A row's tokens lie in the columns [start, high).
    row 1     ·         start┌───────────┤         │      What lies to the left of its start is masked.
    row 2     ·         ┌────────────────┤         │      A step writes column high, and reads [:rows, :, low:high + 1].
    (free)                                                Slots beyond extent.rows are free.

All rows end at the same column, so the model sees an ordinary left-padded batch. transformers' own masks (causal,
sliding-window, chunked) and position-dependent biases therefore remain correct for every architecture.

A request joins by copying its prefilled columns in front of `high`. When one leaves, the last row moves into its slot. When
the columns run out, all live columns move to the left; that copy is rare.

A model whose layers keep anything but all past keys and values (recurrent states, compressed or indexed caches) cannot be
joined like this. `StaticRows` runs it in batches that are filled once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer


class BatchRows(Protocol):
    """The caches of a running batch."""

    @property
    def cache(self) -> Any:
        """The cache to give to the model."""

    def new(self) -> Cache | None:
        """Return the cache for a prefill; None if the model is to create its own kind."""

    def add(self, prefilled: Any, rows: list[int], padding: list[int], width: int) -> None:
        """Append rows of a prefilled batch to this batch.

        Args:
            prefilled: the prefilled batch's cache.
            rows: which of its rows to append.
            padding: per row of the prefilled batch, its columns of padding on the left.
            width: columns of the prefilled batch.
        """

    def keep(self, rows: list[int]) -> list[int]:
        """Keep only these rows. Returns the permutation: new row i was old row order[i]."""

    def step_inputs(self) -> tuple[Int[Tensor, "rows columns"], Int[Tensor, "rows 1"]]:
        """Make room for one more column; returns the step's attention mask (0 is padding) and position ids, on the CPU."""

    def stepped(self, cache: Any) -> None:
        """Record that a forward has written a column; `cache` is the cache that it returned."""


def is_continuous(config: PreTrainedConfig) -> bool:
    """Whether every layer of a model's cache holds past keys and values, so that rows can join at any time.

    A sliding-window layer counts too: it is kept whole, and its mask hides what is behind the window.
    """
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=config).layers)


class SlotRows:
    """A batch that rows can join and leave at any step (see the module)."""

    def __init__(self) -> None:
        self.cache = Cache(layers=[])
        self._extent = _Extent()
        self._starts: list[int] = []

    def new(self) -> DynamicCache:
        """Return a cache that keeps every column of every layer, also of sliding-window layers."""
        return DynamicCache()

    def add(self, prefilled: DynamicCache, rows: list[int], padding: list[int], width: int) -> None:
        """See `BatchRows.add`."""
        extent = self._extent
        while len(self.cache.layers) < len(prefilled.layers):
            self.cache.layers.append(_SlotLayer(extent))
        self._make_room(len(rows), width)
        columns = slice(extent.high - width, extent.high)
        index = torch.tensor(rows)
        for mine, theirs in zip(self.cache.layers, prefilled.layers, strict=True):
            mine.write(slice(extent.rows, extent.rows + len(rows)), columns, theirs, index)
        self._starts += [columns.start + padding[row] for row in rows]
        self._resize(extent.rows + len(rows))

    def keep(self, rows: list[int]) -> list[int]:
        """See `BatchRows.keep`; only rows that fill a gap move."""
        order = fill_gaps(self._extent.rows, rows)
        for row, source in enumerate(order):
            if row != source:
                for layer in self.cache.layers:
                    layer.move(source, row, slice(self._starts[source], self._extent.high))
        self._starts = [self._starts[source] for source in order]
        self._resize(len(order))
        return order

    def start(self, row: int) -> int:
        """Return the column of a row's first token."""
        return self._starts[row]

    def step_inputs(self) -> tuple[Int[Tensor, "rows columns"], Int[Tensor, "rows 1"]]:
        """See `BatchRows.step_inputs`."""
        self._make_room(0, 0)
        starts = torch.tensor(self._starts)[:, None]
        columns = torch.arange(self._extent.low, self._extent.high + 1)
        return (columns >= starts).long(), self._extent.high - starts

    def stepped(self, cache: Any) -> None:
        """See `BatchRows.stepped`."""
        self._extent.high += 1

    def _resize(self, rows: int) -> None:
        self._extent.rows = rows
        self._extent.low = min(self._starts, default=self._extent.high)

    def _make_room(self, more_rows: int, width: int) -> None:
        """Make room for more rows, for `width` columns before `high`, and for one column from `high` on."""
        extent = self._extent
        rows = extent.rows + more_rows
        if rows <= extent.slots and extent.high >= width and extent.high < extent.columns:
            return
        live = extent.high - extent.low
        high = max(live, width)
        if rows > extent.slots or high >= extent.columns:
            if rows > extent.slots:
                extent.slots = max(
                    rows, 2 * extent.slots
                )  # doubled, so that rows that join one by one cause few copies
            # A quarter more than is needed now: a larger slab moves less often, but wastes more memory.
            extent.columns = high + max(64, high // 4)
        for layer in self.cache.layers:
            layer.relocate(slice(extent.low, extent.high), slice(high - live, high))
        self._starts = [start + high - extent.high for start in self._starts]
        extent.low, extent.high = high - live, high


class StaticRows:
    """A batch that is filled once, for caches that rows cannot join.

    States that the model keeps in its own modules are reduced with the cache.
    """

    def __init__(
        self, new: Callable[[], Cache | None] = lambda: None, modules: tuple[tuple[nn.Module, str], ...] = ()
    ) -> None:
        """Create an empty batch.

        Args:
            new: creates the cache for a prefill; None for what the model creates itself.
            modules: modules that keep a state per sequence themselves, each with the attribute's name.
        """
        self._new = new
        self._modules = modules
        self.cache: Any = None
        self._padding: list[int] = []
        self._width = 0

    def new(self) -> Cache | None:
        """See `BatchRows.new`."""
        return self._new()

    def add(self, prefilled: Any, rows: list[int], padding: list[int], width: int) -> None:
        """See `BatchRows.add`; the batch must be empty, and takes ownership of the prefilled cache."""
        if self._padding:
            raise ValueError("rows cannot join a static batch")
        self.cache, self._padding, self._width = prefilled, padding, width
        self.keep(rows)

    def keep(self, rows: list[int]) -> list[int]:
        """See `BatchRows.keep`."""
        n_rows = len(self._padding)
        if len(rows) < n_rows:
            index = torch.tensor(rows, dtype=torch.long)
            self.cache = select_rows(self.cache, index, n_rows)
            for module, name in self._modules:
                setattr(module, name, select_rows(getattr(module, name), index, n_rows))
            self._padding = [self._padding[row] for row in rows]
        return rows

    def step_inputs(self) -> tuple[Int[Tensor, "rows columns"], Int[Tensor, "rows 1"]]:
        """See `BatchRows.step_inputs`."""
        padding = torch.tensor(self._padding)[:, None]
        return (torch.arange(self._width + 1) >= padding).long(), self._width - padding

    def stepped(self, cache: Any) -> None:
        """See `BatchRows.stepped`."""
        self.cache = cache
        self._width += 1


def cache_tensors(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Yield each tensor of a cache once, whatever the cache is made of."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    if isinstance(value, Tensor):
        seen.add(id(value))
        yield value
    elif (parts := _parts(value)) is not None:
        seen.add(id(value))
        for part in parts.values():
            yield from cache_tensors(part, seen)


def select_rows(value: Any, rows: Int[Tensor, "kept"], n_rows: int, done: dict[int, Any] | None = None) -> Any:
    """Return a cache with only some of its rows; its objects are changed in place, tensors are replaced.

    Args:
        value: the cache, or a part of it.
        rows: rows to keep.
        n_rows: rows it has now.
        done: parts that have been replaced already: layers may share a tensor.
    """
    done = {} if done is None else done
    if id(value) in done:
        return done[id(value)]
    result = done[id(value)] = value
    if isinstance(value, Tensor):
        if value.ndim and value.shape[0] == n_rows:
            result = value.index_select(0, rows.to(value.device))
    elif (parts := _parts(value)) is not None:
        found = {name: select_rows(part, rows, n_rows, done) for name, part in parts.items()}
        if isinstance(value, tuple):
            result = tuple(found.values())
        elif isinstance(value, list):
            value[:] = found.values()
        elif isinstance(value, dict):
            value.update(found)
        else:
            vars(value).update(found)
    done[id(value)] = result
    return result


def _parts(value: Any) -> dict[Any, Any] | None:
    """Return the parts of a cache, of one of its layers, or of a container in it; None for anything else."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if isinstance(value, type | nn.Module | PreTrainedConfig):
        return None
    return dict(vars(value)) if hasattr(value, "__dict__") else None


def fill_gaps(n_rows: int, keep: list[int]) -> list[int]:
    """Return, per place of the kept rows, the row that takes it, such that the fewest rows move.

    Kept rows among the first `len(keep)` stay; the others fill the gaps, from the last on.
    """
    late = [row for row in keep if row >= len(keep)]
    staying = set(keep)
    return [row if row in staying else late.pop() for row in range(min(len(keep), n_rows))]


@dataclass(frozen=True)
class Slots:
    """The slabs of all layers, and the columns in use."""

    keys: list[Float[Tensor, "slots kv_heads columns d"]]
    """Per layer, its keys; empty for a layer that shares another layer's."""
    values: list[Float[Tensor, "slots kv_heads columns d"]]
    """Per layer, its values."""
    low: int
    """First column in use."""
    high: int
    """Column that the next step fills."""


def slots_of(cache: Cache) -> Slots:
    """Return the slabs of a running batch's cache (`SlotRows.cache`)."""
    layers = [layer for layer in cache.layers if isinstance(layer, _SlotLayer)]
    none = torch.empty(0, 0, 0, 0)
    keys = [none if layer.keys is None else layer.keys for layer in layers]
    values = [none if layer.values is None else layer.values for layer in layers]
    return Slots(keys, values, layers[0].extent.low, layers[0].extent.high)


class _Extent:
    """The geometry that all layers of a slot cache share: the size of the slabs, and the rows and columns in use."""

    def __init__(self) -> None:
        self.slots = self.columns = 0
        self.rows = self.low = self.high = 0


class _SlotLayer(CacheLayerMixin):
    """One layer's slabs; the shared extent says how much of them is in use."""

    is_sliding = False
    keys: Float[Tensor, "slots kv_heads columns d"] | None
    values: Float[Tensor, "slots kv_heads columns d"] | None

    def __init__(self, extent: _Extent) -> None:
        super().__init__()
        self.extent = extent

    def write(self, rows: slice, columns: slice, source: CacheLayerMixin, index: Int[Tensor, "rows"]) -> None:
        """Copy prefilled rows into slots; a layer that shares another layer's keys and values has no slabs."""
        if source.keys is None or source.values is None:
            return
        if self.keys is None or self.values is None:
            self.lazy_initialization(source.keys, source.values)
        assert self.keys is not None
        assert self.values is not None
        index = index.to(source.keys.device)
        self.keys[rows, :, columns] = source.keys[index]
        self.values[rows, :, columns] = source.values[index]

    def move(self, source: int, target: int, columns: slice) -> None:
        """Copy one row's columns to another slot."""
        for slab in (self.keys, self.values):
            if slab is not None:
                slab[target, :, columns] = slab[source, :, columns]

    def relocate(self, before: slice, after: slice) -> None:
        """Move the live columns; into a larger slab if there are more slots or columns now."""
        extent, rows = self.extent, self.extent.rows
        if self.keys is None or self.values is None:
            return
        slabs = []
        for slab in (self.keys, self.values):
            live = slab[:rows, :, before]
            shape = (extent.slots, slab.shape[1], extent.columns, slab.shape[3])
            # Zeros, because masked values are still multiplied by zero and must not be NaN.
            target = slab if slab.shape == shape else slab.new_zeros(shape)
            target[:rows, :, after] = live.clone() if target is slab else live
            slabs.append(target)
        self.keys, self.values = slabs

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Create the slabs."""
        slots, columns = self.extent.slots, self.extent.columns
        self.keys = key_states.new_zeros(slots, key_states.shape[1], columns, key_states.shape[3])
        self.values = value_states.new_zeros(slots, value_states.shape[1], columns, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write one new column; returns all columns of the rows in use, padding included."""
        assert self.keys is not None
        assert self.values is not None
        rows, low, high = self.extent.rows, self.extent.low, self.extent.high
        self.keys[:rows, :, high : high + 1] = key_states
        self.values[:rows, :, high : high + 1] = value_states
        return self.keys[:rows, :, low : high + 1], self.values[:rows, :, low : high + 1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of columns after this step, and the first column."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of columns in use."""
        return self.extent.high - self.extent.low

    def get_max_length(self) -> int:
        """Return -1, for no limit."""
        return -1
