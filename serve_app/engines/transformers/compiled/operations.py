"""What a compiled step leaves to the engine, as operations of PyTorch: the graph calls them, and their arguments are numbers.

`linear` multiplies by a packed weight, `attend` writes a layer's new keys and values and attends over all of them, and `visit`
shows a value to those who look, who may add to it in place. What the numbers stand for is bound to the thread for as long as a
step runs, so that one graph serves every batch, and several engines of a process do not meet.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from serve_app.engines.transformers.attention import attend_to_cache
from serve_app.engines.transformers.packed_weights import multiply

T = TypeVar("T")

NAMESPACE = "roentgen"


@dataclass(frozen=True)
class Bound:
    """What a step's operations refer to."""

    linears: Sequence[tuple[Tensor, Tensor | None]]
    """By number, a linear layer's packed weight and its bias."""
    layers: Sequence[Any]
    """By number, the layers of the cache."""
    visits: Mapping[int, Callable[[Tensor], None]]
    """By the number of a place, who looks there."""
    failures: list[BaseException] = field(default_factory=list)
    """What operations have raised."""


class _Thread(threading.local):
    bound: Bound | None = None


_thread = _Thread()


@contextmanager
def bound(step: Bound) -> Iterator[None]:
    """Have this thread's operations refer to these things.

    Raises:
        BaseException: the first that an operation has raised.
    """
    _thread.bound = step
    try:
        yield
    except RuntimeError:
        if step.failures:
            raise step.failures[0] from None
        raise
    finally:
        _thread.bound = None


def _here() -> Bound:
    assert _thread.bound is not None, "an operation of a compiled step was called outside of one"
    return _thread.bound


def _linear(rows: Float[Tensor, "... width"], number: int, outputs: int) -> Float[Tensor, "... outputs"]:
    weight, bias = _here().linears[number]
    return multiply(rows, weight, bias)


def _attend(
    query: Float[Tensor, "rows heads 1 d"],
    key: Float[Tensor, "rows kv_heads 1 d"],
    value: Float[Tensor, "rows kv_heads 1 d_value"],
    mask: Float[Tensor, "rows 1 1 columns"],
    layer: int,
    scaling: float,
) -> Float[Tensor, "rows 1 heads d_value"]:
    keys, values = _here().layers[layer].update(key, value)
    return attend_to_cache(query, keys, values, mask, scaling)


def _visit(value: Tensor, place: int) -> None:
    look = _here().visits.get(place)
    if look is not None:
        look(value)


def _noting(operation: Callable[..., T]) -> Callable[..., T]:
    """Return an operation that notes what it raises: to whoever runs the graph, PyTorch passes on that it failed, not how."""

    def call(*args: Any) -> T:
        try:
            return operation(*args)
        except BaseException as error:
            _here().failures.append(error)
            raise

    return call


_library = torch.library.Library(NAMESPACE, "DEF")
_library.define("linear(Tensor rows, SymInt number, SymInt outputs) -> Tensor")
_library.define("attend(Tensor query, Tensor key, Tensor value, Tensor mask, SymInt layer, float scaling) -> Tensor")
_library.define("visit(Tensor(a!) value, SymInt place) -> ()")
_library.impl("linear", _noting(_linear), "CPU")
_library.impl("attend", _noting(_attend), "CPU")
_library.impl("visit", _noting(_visit), "CPU")


@torch.library.register_fake(f"{NAMESPACE}::linear")
def _linear_shape(rows: Tensor, number: int, outputs: int) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], outputs)


@torch.library.register_fake(f"{NAMESPACE}::attend")
def _attend_shape(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, layer: int, scaling: float) -> Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], value.shape[-1])


@torch.library.register_fake(f"{NAMESPACE}::visit")
def _visit_shape(value: Tensor, place: int) -> None:
    return None


linear, attend, visit = torch.ops.roentgen.linear, torch.ops.roentgen.attend, torch.ops.roentgen.visit
"""The operations, as a model's code calls them."""
