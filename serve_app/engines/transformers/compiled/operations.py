"""PyTorch operations that a compiled graph calls and the engine implements; the graph passes indices, not objects.

`linear` multiplies by a packed weight. `attend` writes a layer's new keys and values and attends over all of them. `observe`
passes a value to its observers, which may add to it in place. They are in C++ (operations.cpp): a step calls hundreds of them,
and a Python call takes about as long as a small product. The process that compiles the graphs builds the operations too.

While a step runs, this thread is bound to the objects that the indices refer to. So one graph serves every batch, and several
engines of one process do not interfere.
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

from roentgen.model_names import cache_folder
from serve_app.engines.transformers.kv_cache import Slots

NAMESPACE = "roentgen"

SOURCE = Path(__file__).with_suffix(".cpp")


@dataclass(frozen=True)
class StepBindings:
    """The objects that a step's operations refer to by index."""

    linears: Sequence[tuple[Tensor, Tensor | None]]
    """Per linear layer, its packed weight and its bias."""
    slots: Slots
    """The keys and values of the running batch."""
    modules: int
    """Number of modules whose outputs the graph exposes."""
    callbacks: Mapping[int, Callable[[Tensor], None]]
    """Per index of an exposed module, the callback that receives its output."""
    failures: list[BaseException] = field(default_factory=list)
    """Errors that callbacks have raised."""


class _Thread(threading.local):
    bound: StepBindings | None = None


_thread = _Thread()


@contextmanager
def bind(step: StepBindings) -> Iterator[None]:
    """Bind this thread's operations to a step's objects.

    Raises:
        BaseException: the first error that a callback has raised.
        RuntimeError: if an operation failed.
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
            list(step.callbacks),
            step.modules,
        )
        yield
    except RuntimeError:
        # PyTorch reports that an operation failed, but not the error.
        if step.failures:
            raise step.failures[0] from None
        raise
    finally:
        torch.ops.roentgen.release()
        _thread.bound = None


def _notify(value: Tensor, index: int) -> None:
    assert _thread.bound is not None
    try:
        _thread.bound.callbacks[index](value)
    except BaseException as error:
        _thread.bound.failures.append(error)
        raise


def library_file() -> Path:
    """Return the library file of the compiled operations, for this source, PyTorch version and processor."""
    made_of = (SOURCE.read_text(), torch.__version__, torch.backends.cpu.get_cpu_capability())
    return cache_folder() / "compiled" / f"operations-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:24]}.so"


@cache
def load(library: Path) -> None:
    """Load the operations, once per process.

    Args:
        library: the file that `library_file` returns.
    """
    torch.ops.load_library(library)
    torch.library.impl(f"{NAMESPACE}::notify", "CPU", _notify)
    torch.library.register_fake(f"{NAMESPACE}::linear", _linear_shape)
    torch.library.register_fake(f"{NAMESPACE}::attend", _attend_shape)
    torch.library.register_fake(f"{NAMESPACE}::observe", lambda value, index: None)


def _linear_shape(rows: Tensor, number: int, outputs: int) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], outputs)


def _attend_shape(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, layer: int, scaling: float) -> Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], value.shape[-1])
