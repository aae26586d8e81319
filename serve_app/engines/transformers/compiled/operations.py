"""PyTorch operations that a compiled graph calls and the engine implements; the graph passes indices, not objects.

`linear` multiplies by a packed weight. `attend` writes a layer's new keys and values and attends over all of them. `observe`
passes a value to its observers, which may add to it in place. While a step runs, this thread is bound to the objects that the
indices refer to. So one graph serves every batch, and several engines of one process do not interfere.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from serve_app.engines.transformers.grouped_attention import attend_to_cache
from serve_app.engines.transformers.packed_weights import multiply

T = TypeVar("T")

NAMESPACE = "roentgen"

SOURCE = Path(__file__).with_suffix(".cpp")


@dataclass(frozen=True)
class StepBindings:
    """The objects that a step's operations refer to by index."""

    linears: Sequence[tuple[Tensor, Tensor | None]]
    """Per linear layer, its packed weight and its bias."""
    layers: Sequence[Any]
    """The cache's layers."""
    callbacks: Mapping[int, Callable[[Tensor], None]]
    """Per index of an observed module, the callback that receives its output."""
    failures: list[BaseException] = field(default_factory=list)
    """Errors that operations have raised."""


class _Thread(threading.local):
    bound: StepBindings | None = None


_thread = _Thread()


@contextmanager
def bind(step: StepBindings) -> Iterator[None]:
    """Bind this thread's operations to a step's objects.

    Raises:
        BaseException: the first error that an operation has raised.
    """
    try:
        _thread.bound = step
        torch.ops.roentgen.bind(
            [weight for weight, _ in step.linears],
            [bias for _, bias in step.linears],
            step.slots.keys,
            step.slots.values,
            step.slots.low,
            step.slots.high,
            list(step.visits),
            step.hook_points,
        )
        yield
    except RuntimeError:
        # PyTorch passes on that an operation failed, not how.
        if step.failures:
            raise step.failures[0] from None
        raise
    finally:
        torch.ops.roentgen.release()
        _thread.bound = None


def _here() -> StepBindings:
    assert _thread.bound is not None, "an operation of a compiled step was called outside of a step"
    return _thread.bound


def library_file() -> Path:
    """Return where the compiled operations are kept, for this source, PyTorch and processor."""
    made_of = (SOURCE.read_text(), torch.__version__, torch.backends.cpu.get_cpu_capability())
    return cache_folder() / "compiled" / f"operations-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:24]}.so"


@cache
def load(library: Path) -> None:
    """Load the operations; a process does so once.

    Args:
        library: as `library_file` names it.
    """
    torch.ops.load_library(library)
    torch.library.impl(f"{NAMESPACE}::show", "CPU", _show)
    torch.library.register_fake(f"{NAMESPACE}::linear", _linear_shape)
    torch.library.register_fake(f"{NAMESPACE}::attend", _attend_shape)
    torch.library.register_fake(f"{NAMESPACE}::visit", lambda value, place: None)


def _observe(value: Tensor, number: int) -> None:
    look = _here().callbacks.get(number)
    if look is not None:
        look(value)


def _noting(operation: Callable[..., T]) -> Callable[..., T]:
    """Wrap an operation so that its error is recorded: PyTorch reports to the graph's caller that it failed, but not how."""

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
_library.define("observe(Tensor(a!) value, SymInt number) -> ()")
_library.impl("linear", _noting(_linear), "CPU")
_library.impl("attend", _noting(_attend), "CPU")
_library.impl("observe", _noting(_observe), "CPU")


@torch.library.register_fake(f"{NAMESPACE}::linear")
def _linear_shape(rows: Tensor, number: int, outputs: int) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], outputs)


def _attend_shape(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, layer: int, scaling: float) -> Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], value.shape[-1])


@torch.library.register_fake(f"{NAMESPACE}::observe")
def _observe_shape(value: Tensor, number: int) -> None:
    return None


linear, attend, observe = torch.ops.roentgen.linear, torch.ops.roentgen.attend, torch.ops.roentgen.observe
"""The operations, as the exported code calls them."""
