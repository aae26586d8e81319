"""Shows module inputs and outputs during a forward, through nnsight, once per step for the whole batch.

nnsight parks a block of intervention code at each location it reads. Parking once per request and hook point is what makes
captures slow (one greenlet switch each); nnsight's caches avoid it: a cache is an observer to which the interleaver
hands every value of the locations it subscribes to. `_TapObserver` is such a cache, but hands values on to visitors at once:
to what adds to some rows in place (`steering`), what copies those it wants while the tensor is hot (`rows`), and what scores
them (`probe_scores`). None keeps the batch's storage alive. At one location they come in the order they are given, so what steers
goes first, and the others see what the model goes on with.

Each module that nnsight wraps pays a little in every forward. So `ObservedModel` mirrors no submodule at first; nnsight then
wraps one when it is first reached by attribute, which is when a request first asks for it.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

from roentgen.compat import check
from serve_app.capture.structure import Tap
from serve_app.capture.watching import nth_tensor

# Importing nnsight puts `.save` on every Python object, which breaks classes that check their attributes (anyio's, and with
# them Ray Serve's replicas). Nothing here needs it: take it off again.
if unmount is not None:
    unmount("save")

log = logging.getLogger(__name__)

T = TypeVar("T")


class Visitor(Protocol):
    """Something that is shown values of one forward."""

    taps: dict[str, Tap]
    """Per stored key, where it wants to look."""

    def __call__(self, key: str, value: Float[Tensor, "rows width ..."]) -> None:
        """Look at the whole batch's value; what is kept of it must be copied before this returns."""

    def fail(self, key: str, reason: str) -> None:
        """Take note that a key's value cannot be had in this forward: that concerns only the requests that asked for it."""


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
            envoy = _child(envoy, part)
        return f"{envoy.path}.{tap.side}"

    def run(self, visitors: Sequence[Visitor], forward: Callable[[], T]) -> T:
        """Run a forward and show each visitor the values of its taps, in the order the model reaches them.

        Args:
            visitors: who wants to look; at one location in this order.
            forward: runs the model; called once, on this thread.

        Returns:
            What `forward` returned.
        """
        visits: dict[str, list[Visit]] = {}
        for visitor in visitors:
            for key, tap in visitor.taps.items():  # a norm that feeds attention and MLP has two names
                try:
                    location = self.location(tap)
                except AttributeError as error:
                    visitor.fail(key, f"{tap} cannot be reached: {error}")
                else:
                    visits.setdefault(location, []).append(Visit(visitor, key, tap.place, tap.run))
        if not visits:
            return forward()
        observer = _TapObserver(self, visits)
        results: list[T] = []
        # Two blocks, not one `with` of two: nnsight captures the outer block's body, and the inner block is in it.
        with self.trace(fn=lambda: results.append(forward())) as tracer:  # noqa: SIM117
            with tracer.invoke():
                Mediator.current("the tap observer").caches.append(observer)
        return results[0]


def _child(envoy: Envoy, name: str) -> Envoy:
    """Return the envoy of a submodule, wrapping it if this is the first time.

    A submodule may be named as something that every envoy has (`output` in BERT's layers); nnsight then calls its envoy
    otherwise, and the attribute is not it.
    """
    for attribute in (f"{Envoy.OVERLOAD_PREFIX}{name}", name):
        child = vars(envoy).get(attribute)
        if isinstance(child, Envoy):
            return child
    wrapped: Envoy = envoy._wrap_envoy(name, envoy._module.get_submodule(name))
    return wrapped


@dataclass(frozen=True)
class Visit:
    """Who wants to look at a location, under which key, at which of its tensors, in which of its runs."""

    visitor: Visitor
    key: str
    place: int
    run: int | None

    def show(self, value: Any) -> None:
        """Show a location's value. What goes wrong is told to the visitor: an exception would end the whole batch's forward."""
        try:
            tensor = nth_tensor(value, self.place)
        except TypeError:
            return  # a module that passes no tensor has no rows; the request that asked is told
        try:
            self.visitor(self.key, tensor)
        except Exception as error:
            log.exception("%s could not be read", self.key)
            self.visitor.fail(self.key, f"{self.key} could not be read ({type(error).__name__}: {error})")


class _TapObserver(Cache):
    """A cache that hands values on instead of keeping them."""

    def __init__(self, model: ObservedModel, visits: dict[str, list[Visit]]) -> None:
        super().__init__(model, modules=[])
        self._visits = visits
        self._runs: Counter[str] = Counter()

    def subscriptions(self) -> dict[str, str]:
        return {location: location for location in self._visits}

    def observe_selected(self, selected: str, value: Any) -> None:
        run = self._runs[selected]
        self._runs[selected] += 1
        for visit in self._visits[selected]:
            if visit.run is None and run:
                visit.visitor.fail(
                    visit.key, f"{visit.key} runs more than once in a forward, so it does not give a row per token"
                )
            elif visit.run in (None, run):
                visit.show(value)


def observe(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ObservedModel:
    """Wrap a loaded model with nnsight, instrumenting nothing yet."""
    check("nnsight")
    return ObservedModel(module, tokenizer=tokenizer, envoys=_Bare)


def wrapped(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TransformersModel:
    """Wrap a loaded model as nnsight's users know it: a trace takes texts or tokens. Another wrapping may be there already."""
    check("nnsight")
    return TransformersModel(module, tokenizer=tokenizer)
