"""Shows module inputs and outputs to observers during a forward, through nnsight, once per step for the whole batch.

nnsight's usual way is to run a block of intervention code, and to suspend it at each location that it reads. One suspended
block per request and hook point makes captures slow, because each costs a greenlet switch. nnsight's caches avoid this: a
cache subscribes to locations, and the interleaver passes it every value there. `_TapObserver` is such a cache, but it passes
values on at once instead of keeping them. Its observers are steering, which adds to some rows in place (`steering`), capture,
which copies rows (`rows`), and probes, which score rows (`probe_scores`). No observer keeps the batch's storage alive.
Observers of one location run in the order they are given: steering comes first, so the others see the values that the model
continues with.

Each module that nnsight wraps costs a little in every forward. So `ObservedModel` wraps no submodule at first. nnsight wraps a
submodule when it is first reached by attribute, which is when a request first taps it.
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


class StepObserver(Protocol):
    """Receives the values of its taps in one forward."""

    taps: dict[str, Tap]
    """Per stored key, where to read."""

    def __call__(self, key: str, value: Float[Tensor, "rows width ..."]) -> None:
        """Receive the whole batch's value. Copy what must be kept: the value may change after this returns."""

    def fail(self, key: str, reason: str) -> None:
        """Record that a key has no value in this forward; only the requests that asked for it fail."""


class _Bare(Envoy):
    """An envoy that wraps its children when they are first reached, not when it is created."""

    def _add_envoy(self, name: str, module: torch.nn.Module) -> None:
        return None


class ObservedModel(TransformersModel):
    """The nnsight model, whose submodules are wrapped when they are first tapped.

    Its traces run a callable that builds its own inputs.
    """

    def _add_envoy(self, name: str, module: torch.nn.Module) -> None:
        return None

    def _batch(self, invokes: list[Any], fn: Any) -> tuple[tuple[()], dict[str, Any]]:
        # The engine builds its own batches, so a trace has nothing to assemble.
        return (), {}

    def location(self, tap: Tap) -> str:
        """Return nnsight's name for a tap's location; wraps the module if it is not wrapped yet."""
        envoy: Envoy = self
        for part in tap.module.split("."):
            envoy = _child(envoy, part)
        return f"{envoy.path}.{tap.side}"

    def run(self, observers: Sequence[StepObserver], forward: Callable[[], T]) -> T:
        """Run a forward and pass the value of each tap to its observers, in the order the model reaches the taps.

        Args:
            observers: receive values; observers of one location run in this order.
            forward: runs the model; called once, on this thread.

        Returns:
            What `forward` returned.
        """
        subscriptions: dict[str, list[Subscription]] = {}
        for observer in observers:
            for key, tap in observer.taps.items():  # a norm that feeds attention and MLP has two names
                try:
                    location = self.location(tap)
                except AttributeError as error:
                    observer.fail(key, f"{tap} cannot be reached: {error}")
                else:
                    subscriptions.setdefault(location, []).append(Subscription(observer, key, tap.index, tap.run))
        if not subscriptions:
            return forward()
        cache = _TapObserver(self, subscriptions)
        results: list[T] = []
        # Two blocks, not one `with` of two: nnsight captures the outer block's body, and the inner block is in it.
        with self.trace(fn=lambda: results.append(forward())) as tracer:  # noqa: SIM117
            with tracer.invoke():
                Mediator.current("the tap observer").caches.append(cache)
        return results[0]


def _child(envoy: Envoy, name: str) -> Envoy:
    """Return the envoy of a submodule; wraps it if it is not wrapped yet.

    A submodule may have the name of an attribute that every envoy has (`output` in BERT's layers). nnsight then stores its
    envoy under another name.
    """
    for attribute in (f"{Envoy.OVERLOAD_PREFIX}{name}", name):
        child = vars(envoy).get(attribute)
        if isinstance(child, Envoy):
            return child
    wrapped: Envoy = envoy._wrap_envoy(name, envoy._module.get_submodule(name))
    return wrapped


@dataclass(frozen=True)
class Subscription:
    """One observer's subscription to a location: under which key, to which of its tensors, and in which of its runs."""

    observer: StepObserver
    key: str
    index: int
    run: int | None

    def notify(self, value: Any) -> None:
        """Pass a location's value to the observer.

        Errors are reported to the observer, because an exception would end the whole batch's forward.
        """
        try:
            tensor = nth_tensor(value, self.index)
        except TypeError:
            return  # a module that passes no tensor has no rows; the request that asked for it fails when it ends
        try:
            self.observer(self.key, tensor)
        except Exception as error:
            log.exception("%s could not be read", self.key)
            self.observer.fail(self.key, f"{self.key} could not be read ({type(error).__name__}: {error})")


class _TapObserver(Cache):
    """A cache that passes values on instead of keeping them."""

    def __init__(self, model: ObservedModel, subscriptions: dict[str, list[Subscription]]) -> None:
        super().__init__(model, modules=[])
        self._subscriptions = subscriptions
        self._runs: Counter[str] = Counter()

    def subscriptions(self) -> dict[str, str]:
        return {location: location for location in self._subscriptions}

    def observe_selected(self, selected: str, value: Any) -> None:
        run = self._runs[selected]
        self._runs[selected] += 1
        for subscription in self._subscriptions[selected]:
            if subscription.run is None and run:
                subscription.observer.fail(
                    subscription.key,
                    f"{subscription.key} runs more than once in a forward, so it has no row per token",
                )
            elif subscription.run in (None, run):
                subscription.notify(value)


def observe(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ObservedModel:
    """Wrap a loaded model with nnsight; no submodule is wrapped yet."""
    check("nnsight")
    return ObservedModel(module, tokenizer=tokenizer, envoys=_Bare)


def wrapped(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TransformersModel:
    """Wrap a loaded model as nnsight's users expect: a trace takes text or tokens. The model may be wrapped already."""
    check("nnsight")
    return TransformersModel(module, tokenizer=tokenizer)
