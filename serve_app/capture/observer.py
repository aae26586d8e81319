"""Reads module inputs and outputs during a forward, through nnsight, once per step for the whole batch.

nnsight parks a block of intervention code at each location it reads. Parking once per request and hook point is what makes
captures slow (one greenlet switch each); nnsight's caches avoid it: a cache is an observer to which the interleaver
hands every value of the locations it subscribes to. `_TapObserver` is such a cache, but hands values on to a sink at once,
which copies the rows it wants while the tensor is hot, and never keeps the batch's storage alive.

Each module that nnsight wraps pays a little in every forward. So `ObservedModel` mirrors no submodule at first; nnsight then
wraps one when it is first reached by attribute, which is when a request first asks for it.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from nnsight import Envoy
from nnsight._c import unmount
from nnsight.intervention.cache import Cache
from nnsight.intervention.interleaver import Mediator
from nnsight.modeling.transformers import TransformersModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from serve_app.capture.structure import Tap
from serve_app.capture.watching import nth_tensor

# Importing nnsight puts `.save` on every Python object, which breaks classes that check their attributes (anyio's, and with
# them Ray Serve's replicas). Nothing here needs it: take it off again.
if unmount is not None:
    unmount("save")

Sink = Callable[[str, Float[Tensor, "batch tokens ..."]], None]
"""Called with a stored key and the whole batch's value; must copy what it keeps before it returns."""

T = TypeVar("T")


class _Bare(Envoy):
    """An envoy whose children are wrapped when they are first reached, not when it is made."""

    def _add_envoy(self, name: str, module: torch.nn.Module) -> None:
        return None


class ObservedModel(TransformersModel):
    """The nnsight model, bare until asked, whose traces run a callable that builds its own inputs."""

    def _add_envoy(self, name: str, module: torch.nn.Module) -> None:
        return None

    def _batch(self, invokes: list[Any], fn: Any) -> tuple[tuple[()], dict[str, Any]]:
        # The engine batches for itself; a trace has nothing to assemble.
        return (), {}

    def location(self, tap: Tap) -> str:
        """Return nnsight's name of a tap's location, wrapping the module if this is the first time."""
        envoy: Envoy = self
        for part in tap.module.split("."):
            envoy = getattr(envoy, part)
        return f"{envoy.path}.{tap.side}"

    def run(self, taps: dict[str, Tap], sink: Sink, forward: Callable[[], T]) -> T:
        """Run a forward and hand each tap's value to the sink, in the order the model reaches them.

        Args:
            taps: per stored key, where to read.
            sink: receives the values, during the forward.
            forward: runs the model; called once, on this thread.

        Returns:
            What `forward` returned.
        """
        if not taps:
            return forward()
        keys: dict[str, list[tuple[str, int]]] = {}
        for key, tap in taps.items():  # a norm that feeds attention and MLP has two names
            keys.setdefault(self.location(tap), []).append((key, tap.place))
        observer = _TapObserver(self, keys, sink)
        results: list[T] = []
        # Two blocks, not one `with` of two: nnsight captures the outer block's body, and the inner block is in it.
        with self.trace(fn=lambda: results.append(forward())) as tracer:  # noqa: SIM117
            with tracer.invoke():
                Mediator.current("the tap observer").caches.append(observer)
        return results[0]


class _TapObserver(Cache):
    """A cache that hands values on instead of keeping them."""

    def __init__(self, model: ObservedModel, keys: dict[str, list[tuple[str, int]]], sink: Sink) -> None:
        super().__init__(model, modules=[])
        self._keys = keys
        self._sink = sink

    def subscriptions(self) -> dict[str, str]:
        return {location: location for location in self._keys}

    def observe_selected(self, selected: str, value: Any) -> None:
        for key, place in self._keys[selected]:
            try:
                tensor = nth_tensor(value, place)
            except TypeError:
                continue  # a module that passes no tensor has no rows; the request that asked is told when it ends
            self._sink(key, tensor)


def observe(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ObservedModel:
    """Wrap a loaded model with nnsight, instrumenting nothing yet."""
    return ObservedModel(module, tokenizer=tokenizer, envoys=_Bare)
