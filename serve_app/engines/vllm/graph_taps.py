"""Taps inside a model's own graph: they survive compilation and the replay of CUDA graphs, and prevent neither.

A hook is Python code between two modules. vLLM compiles a model into one graph, in which no Python runs, so hooks are not
called. A tap instead consists of two operations, inserted into the forward of the module that it reads, before the model is
compiled:

    value += table[index[:n]]       add a vector to each steered row; index 0 is a row of zeros
    rows[:n] = value                copy the rows, one per token, into a buffer at a fixed address

To the compiler both are operations like the model's own. It fuses them into the kernels around them, so a tap costs about as
much as writing its rows once. What changes from step to step is in `rows`, `table` and `index`. They are filled before a
forward and read after it, at addresses that a graph may keep. They are buffers of the tapped modules, not variables of a
closure: a graph that vLLM loads from its cache uses the buffers of its model, but would not find a closure.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase

from serve_app.capture.row_memory import to_device
from serve_app.capture.steering import StepSteering
from serve_app.capture.structure import Tap
from serve_app.engines.vllm.hook_points import terms


@dataclass(frozen=True)
class _Point:
    """A tap in a module's forward, and the names of its buffers there."""

    tap: Tap
    rows: str
    index: str | None  # None if rows do not have the stream's width, so that nothing can be added


TABLE = "roentgen_table"
"""Name of the table of steering vectors in every module with a steerable tap."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the taps' buffers."""

    width: int
    """Width of the residual stream."""
    tokens: int
    """Most tokens of one forward."""
    vectors: int
    """Most different vectors that one forward adds."""


class GraphTaps:
    """The taps of one loaded model."""

    def __init__(self, model: nn.Module, taps: Iterable[Tap], sizes: Sizes) -> None:
        """Insert taps into a model that is loaded and not compiled yet.

        Args:
            model: its modules' forwards are wrapped.
            taps: locations of the taps.
            sizes: sizes of the buffers.
        """
        example = next(model.parameters())
        self._modules = dict(model.named_modules())
        self._table = torch.zeros(sizes.vectors + 1, sizes.width, dtype=example.dtype, device=example.device)
        self._points: dict[Tap, _Point] = {}
        self._added: list[tuple[Tensor, int]] = []
        of_module: dict[str, list[_Point]] = {}
        for number, tap in enumerate(dict.fromkeys(taps)):
            module = self._modules[tap.module]
            size = _width(module, tap, sizes.width)
            point = _Point(tap, f"roentgen_rows_{number}", f"roentgen_index_{number}" if size == sizes.width else None)
            rows = torch.zeros(sizes.tokens, size, dtype=example.dtype, device=example.device)
            module.register_buffer(point.rows, rows, persistent=False)
            if point.index is not None:
                index = torch.zeros(sizes.tokens, dtype=torch.long, device=example.device)
                module.register_buffer(point.index, index, persistent=False)
                module.register_buffer(TABLE, self._table, persistent=False)
            self._points[tap] = point
            of_module.setdefault(tap.module, []).append(point)
        for path, points in of_module.items():
            _wrap(self._modules[path], points)

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Locations of the taps."""
        return tuple(self._points)

    def rows(self, tap: Tap, n_tokens: int) -> Float[Tensor, "tokens width"] | None:
        """Return a tap's rows of the last forward; None if there is no such tap."""
        point = self._points.get(tap)
        return None if point is None else getattr(self._modules[tap.module], point.rows)[:n_tokens]

    def steer(self, steering: StepSteering | None) -> None:
        """Write the vectors that the next forward adds.

        Raises:
            ValueError: if there are too many vectors, or one is added elsewhere than at a tap.
        """
        for index, length in self._added:
            index[:length].zero_()
        self._added = []
        if steering is None:
            return
        vectors: list[Tensor] = []
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for key, tap in steering.taps.items():
            point = self._points.get(tap)
            if point is None or point.index is None:
                raise ValueError(f"{key} is not a tap of this server that can be steered")
            places, which, sums = steering.added(key)
            index = getattr(self._modules[tap.module], point.index)
            found.append((index, torch.tensor(places), torch.tensor(which) + len(vectors) + 1))
            vectors += sums
        if len(vectors) >= len(self._table):
            raise ValueError(f"{len(vectors)} different vectors are too many; there is room for {len(self._table) - 1}")
        for index, at, rows in found:
            index.index_copy_(0, to_device(at, index.device), to_device(rows, index.device))
            self._added.append((index, int(at.max()) + 1))
        if vectors:
            self._table[1 : len(vectors) + 1] = to_device(
                torch.stack(vectors).to(self._table.dtype), self._table.device
            )


def buffer_bytes(model: nn.Module, taps: Iterable[Tap], sizes: Sizes) -> int:
    """Return the bytes of the taps' buffers, apart from their indices, which are small."""
    widths = sum(_width(model.get_submodule(tap.module), tap, sizes.width) for tap in set(taps))
    return (widths * sizes.tokens + sizes.width * (sizes.vectors + 1)) * next(model.parameters()).dtype.itemsize


def _wrap(module: nn.Module, points: Sequence[_Point]) -> None:
    """Wrap a module's forward with its taps."""
    forward = module.forward
    taken = [point for point in points if point.tap.side == "input"]
    given = [point for point in points if point.tap.side == "output"]

    def tapped(*args: Any, **kwargs: Any) -> Any:
        for point in taken:
            _touch(module, point, (*args, *kwargs.values()))
        value = forward(*args, **kwargs)
        for point in given:
            _touch(module, point, value)
        return value

    module.forward = tapped


def _touch(module: nn.Module, point: _Point, value: Any) -> None:
    """Add to a value, and copy it."""
    first, *second = terms(value, point.tap)
    rows, n = getattr(module, point.rows), first.shape[0]
    if point.index is not None:
        first.add_(getattr(module, TABLE)[getattr(module, point.index)[:n]])
    rows[:n].copy_(first + second[0] if second else first)


def _width(module: nn.Module, tap: Tap, width: int) -> int:
    """Return the width of a row, as vLLM's linear layers know it; for other modules it is the stream's width."""
    if not isinstance(module, LinearBase):
        return width
    side = f"{tap.side}_size"
    return int(getattr(module, f"{side}_per_partition", None) or getattr(module, side))
