"""Shows module inputs and outputs during a forward, through nnsight, once per step for the whole batch.

nnsight parks a block of intervention code at each location it reads. Parking once per request and hook point is what makes
captures slow (one greenlet switch each); nnsight's caches avoid it: a cache is an observer to which the interleaver
hands every value of the locations it subscribes to. `_TapObserver` is such a cache, but hands values on to visitors at once:
to what adds to some rows in place (`steering`), what copies those it wants while the tensor is hot (`rows`), and what scores
them (`scoring`). None keeps the batch's storage alive. At one location they come in the order they are given, so what steers
goes first, and the others see what the model goes on with.

Each module that nnsight wraps pays a little in every forward. So `ObservedModel` mirrors no submodule at first; nnsight then
wraps one when it is first reached by attribute, which is when a request first asks for it.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

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

T = TypeVar("T")


class Visitor(Protocol):
    """Something that is shown values of one forward.

    Attributes:
        taps: per stored key, where it wants to look.
    """

    taps: dict[str, Tap]

    def __call__(self, key: str, value: Float[Tensor, "rows width ..."]) -> None:
        """Look at the whole batch's value; what is kept of it must be copied before this returns."""


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

    def run(self, visitors: Sequence[Visitor], forward: Callable[[], T]) -> T:
        """Run a forward and show each visitor the values of its taps, in the order the model reaches them.

        Args:
            visitors: who wants to look; at one location in this order.
            forward: runs the model; called once, on this thread.

        Returns:
            What `forward` returned.
        """
        visits: dict[str, list[tuple[Visitor, str, int]]] = {}
        for visitor in visitors:
            for key, tap in visitor.taps.items():  # a norm that feeds attention and MLP has two names
                visits.setdefault(self.location(tap), []).append((visitor, key, tap.place))
        if not visits:
            return forward()
        observer = _TapObserver(self, visits)
        results: list[T] = []
        # Two blocks, not one `with` of two: nnsight captures the outer block's body, and the inner block is in it.
        with self.trace(fn=lambda: results.append(forward())) as tracer:  # noqa: SIM117
            with tracer.invoke():
                Mediator.current("the tap observer").caches.append(observer)
        return results[0]


class _TapObserver(Cache):
    """A cache that hands values on instead of keeping them."""

    def __init__(self, model: ObservedModel, visits: dict[str, list[tuple[Visitor, str, int]]]) -> None:
        super().__init__(model, modules=[])
        self._visits = visits

    def subscriptions(self) -> dict[str, str]:
        return {location: location for location in self._visits}

    def observe_selected(self, selected: str, value: Any) -> None:
        for visitor, key, place in self._visits[selected]:
            try:
                tensor = nth_tensor(value, place)
            except TypeError:
                continue  # a module that passes no tensor has no rows; the request that asked is told when it ends
            visitor(key, tensor)


def observe(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ObservedModel:
    """Wrap a loaded model with nnsight, instrumenting nothing yet."""
    return ObservedModel(module, tokenizer=tokenizer, envoys=_Bare)
