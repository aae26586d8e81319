"""Records one forward: the input and output of every module inside every decoder layer.

A layer's record is passed on when the layer ends and is then dropped, so recording a model of many layers takes the memory of
one layer. Modules are listed in the order they start, a parent before its submodules, so the first match is the outermost.
Values are copied as they pass, because layers add to them in place (Falcon adds attention's output to the MLP's).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

from torch import Tensor, nn


def first_tensor(value: Any) -> Tensor:
    """Return the hidden states of a module's input or output, however the architecture packs them.

    Outputs are a tensor or a tuple that starts with one; inputs are `(args, kwargs)`, with the hidden states as the first
    tensor of either.

    Raises:
        TypeError: if there is no tensor.
    """
    return nth_tensor(value, 0)


def nth_tensor(value: Any, place: int) -> Tensor:
    """Return the tensor at an index among the tensors of a module's input or output.

    Raises:
        TypeError: if there are fewer tensors.
    """
    for tensor in islice(tensors(value), place, None):
        return tensor
    raise TypeError(f"no tensor {place} in a {type(value).__name__}")


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a module's input or output, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | tuple | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


@dataclass
class ModuleCall:
    """One module's input and output in a forward."""

    path: str
    """The module's path from the model's root."""
    module: nn.Module
    """The module."""
    input: Tensor
    """The first tensor of its input, `[batch, tokens, width]` or flattened to `[batch * tokens, width]`."""
    output: Tensor
    """The first tensor of its output, in the same form."""
    other_outputs: list[Tensor] = field(default_factory=list)
    """The other tensors of its output, if that is a tuple."""

    @property
    def _label(self) -> str:
        name = next(part for part in reversed(self.path.split(".")) if not part.isdigit())
        return f"{name} {type(self.module).__name__}".lower()

    @property
    def is_norm(self) -> bool:
        """Whether its class or its name says that it normalizes."""
        return "norm" in self._label

    @property
    def is_attention(self) -> bool:
        """Whether its class or its name says that it attends."""
        return ("attn" in self._label or "attention" in self._label) and not self.is_norm

    def inside(self, other: "ModuleCall") -> bool:
        """Whether its module is a submodule of another's."""
        return self.path.startswith(f"{other.path}.")


@dataclass(frozen=True)
class LayerRun:
    """One run of a decoder layer."""

    path: str
    """The layer's path from the model's root."""
    input: Tensor
    """The layer's input."""
    output: Tensor
    """The layer's output."""
    calls: list[ModuleCall]
    """The modules inside it that ran once and have hidden states as input and a tensor as output, in the order they started."""


@contextmanager
def watch(layers: Iterable[tuple[str, nn.Module]], passed: Callable[[LayerRun], None]) -> Iterator[None]:
    """Call `passed` with each layer's record when the layer ends.

    Args:
        layers: path and module of each decoder layer.
        passed: called once per run of a layer with a tensor as input and output.
    """
    layers = list(layers)
    owners = Counter(module for _, layer in layers for module in layer.modules())
    runs: Counter[str] = Counter()
    started: dict[str, Tensor] = {}
    calls: dict[str, ModuleCall] = {}

    def before(module: nn.Module, args: Any, kwargs: Any, *, path: str, root: str) -> None:
        if path == root:
            for kept in (runs, started, calls):
                kept.clear()
        runs[path] += 1
        tensor = next(tensors((args, kwargs)), None)
        if tensor is not None:
            started[path] = tensor.clone()

    def after(module: nn.Module, args: Any, output: Any, *, path: str, root: str) -> None:
        outputs = [tensor.clone() for tensor in tensors(output)]
        if path in started and outputs and started[path].is_floating_point():
            calls[path] = ModuleCall(path, module, started[path], outputs[0], outputs[1:])
        if path == root and root in calls:
            layer, *inside = (calls[p] for p in started if p in calls and runs[p] == 1)
            passed(LayerRun(root, layer.input, layer.output, inside))

    handles = []
    for root, layer in layers:
        for path, module in layer.named_modules(prefix=root):
            if owners[module] == 1:  # a module that several layers share would record the rows of all of them
                handles.append(
                    module.register_forward_pre_hook(partial(before, path=path, root=root), with_kwargs=True)
                )
                handles.append(module.register_forward_hook(partial(after, path=path, root=root)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
