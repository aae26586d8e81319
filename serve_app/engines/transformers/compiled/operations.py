"""What a compiled step leaves to the engine, as operations of PyTorch: the graph calls them, and their arguments are numbers.

`linear` multiplies by a packed weight, `attend` writes a layer's new keys and values and attends over all of them, and `visit`
shows a value to its visitors, who may add to it in place. They are in C++ (operations.cpp): a step calls hundreds of
them, and a call of Python takes about as long as a small product. The process that compiles the graphs builds them, too.

What the numbers stand for is bound to the thread for as long as a step runs, so that one graph serves every batch, and several
engines of a process do not meet.
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
class Bound:
    """What a step's operations refer to."""

    linears: Sequence[tuple[Tensor, Tensor | None]]
    """By number, a linear layer's packed weight and its bias."""
    slots: Slots
    """The keys and values of the running batch."""
    hook_points: int
    """How many places a graph shows."""
    visits: Mapping[int, Callable[[Tensor], None]]
    """By the number of a place, its visitor."""
    failures: list[BaseException] = field(default_factory=list)
    """What visitors have raised."""


class _Thread(threading.local):
    bound: Bound | None = None


_thread = _Thread()


@contextmanager
def bound(step: Bound) -> Iterator[None]:
    """Have this thread's operations refer to these things.

    Raises:
        BaseException: the first that a visitor has raised.
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


def _show(value: Tensor, place: int) -> None:
    assert _thread.bound is not None
    try:
        _thread.bound.visits[place](value)
    except BaseException as error:
        _thread.bound.failures.append(error)
        raise


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


def _linear_shape(rows: Tensor, number: int, outputs: int) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], outputs)


def _attend_shape(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, layer: int, scaling: float) -> Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], value.shape[-1])
