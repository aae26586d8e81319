"""Passes one vLLM step's values to observers, through nnsight, once for the whole batch.

    nnsight                           here
    Requests: a table of workers,     BatchWorkers: at most one worker, for the whole batch, that runs no code
      one per request
    a worker runs code that is        the worker holds a cache, `_Observer`, which subscribes to the locations
      suspended at each location        that the step's requests tap
    VLLMInterleaver                   BatchInterleaver: skips locations without subscribers

nnsight runs a worker per request and block: a thousand requests that read thirty layers suspend thirty thousand times per
step, and capturing every layer that way costs a third of the throughput. But its interleaver also has caches: observers that
receive every value of the locations they subscribe to. If their worker has no batch group, they receive the whole batch. So
`BatchWorkers` replaces nnsight's table of workers per request. It has one worker for the batch, which has already ended and
holds one such cache, and only in steps with something to read. Everything else is nnsight's: the hooks, the locations, the
gathering of values that tensor parallelism has sharded, and the taps that survive the replay of CUDA graphs.

An error while a value is read must not end the step, which other requests share. It is stored, and fails the requests that
read in that step.
"""

import logging
from collections.abc import Callable
from typing import Any

from nnsight.intervention.cache import Cache
from nnsight.intervention.interleaver import Mediator
from nnsight.modeling.vllm.interleaver import VLLMInterleaver
from nnsight.modeling.vllm.model_runners.GPUModelRunner import Requests
from torch import Tensor

from serve_app.capture.structure import Tap
from serve_app.engines.vllm.batch import Batch
from serve_app.engines.vllm.hook_points import terms
from serve_app.engines.vllm.recorder import sum_of

log = logging.getLogger(__name__)

Look = Callable[[Any], None]
"""Receives the value of a location."""


class BatchInterleaver(VLLMInterleaver):
    """nnsight's interleaver, but it skips locations without observers: each of hundreds of modules calls it three times per
    step."""

    def handle(self, provider: str, value: Any) -> Any:
        """Pass a location's value to its observers."""
        if provider not in self.observers and not self.taps:
            return value
        return super().handle(provider, value)


class BatchWorkers(Requests):
    """nnsight's workers of one vLLM model runner: one for the whole batch, in steps with something to read."""

    def __init__(self, batch: Batch) -> None:
        """Create workers without requests.

        Args:
            batch: the runner's requests.
        """
        super().__init__()
        self._batch = batch
        self._observer: _Observer | None = None

    def add(self, new_requests: list[Any], persistent_objects: dict[str, Any]) -> None:
        """Register new requests."""
        self._batch.begin(new_requests)

    def harvest(self, finished: set[str]) -> None:
        """Drop finished requests."""
        self._batch.end(finished)

    def refuse_chunked(self, spans: list[tuple[str, int]], states: dict[str, Any]) -> None:
        """Reject nothing: a prompt that is read in pieces has its rows in pieces."""

    def scope(self, model: Any, spans: list[tuple[str, int]]) -> None:
        """Plan the step that is about to run: which requests' tokens are in it, and what they read."""
        batch, step = self._batch, self._batch.lay_out(spans)
        looks: dict[str, list[Look]] = {}
        if step is not None:
            # Steering comes first: capture then reads what the model continues with.
            if step.steering is not None:
                steering = step.steering
                _subscribe(looks, steering.taps, lambda key, first, *_: steering(key, first))
            if step.rows is not None:
                _subscribe(looks, step.rows.taps, step.rows if batch.keeps else _ignore)
            if step.scores is not None:
                scores = step.scores
                _subscribe(
                    looks, scores.taps, (lambda key, *found: scores(key, sum_of(found))) if batch.keeps else _ignore
                )
        for recorder in batch.recorders:
            _subscribe(looks, recorder.taps, recorder)
        interleaver = model.interleaver
        interleaver.batcher.total = sum(tokens for _, tokens in spans)
        self.nrows = len(spans)
        self._observer = _Observer(model, looks) if looks else None
        interleaver.mediators = [_worker(self._observer)] if self._observer else []
        interleaver.reindex()

    def end_step(self) -> None:
        """Give each request its rows of the step whose forward has been launched."""
        observer, self._observer = self._observer, None
        self._batch.deliver(observer.failure if observer is not None else None)


class _Observer(Cache):
    """A cache that passes values on instead of keeping them."""

    def __init__(self, model: Any, looks: dict[str, list[Look]]) -> None:
        super().__init__(model, modules=[])
        self._looks = looks
        self.failure: Exception | None = None

    def subscriptions(self) -> dict[str, str]:
        return {location: location for location in self._looks}

    def observe_selected(self, selected: str, value: Any) -> None:
        if self.failure is not None:
            return
        try:
            for look in self._looks[selected]:
                look(value)
        except Exception as error:
            log.exception("the values of %s could not be read", selected)
            self.failure = error


def _subscribe(looks: dict[str, list[Look]], taps: dict[str, Tap], observer: Callable[..., None]) -> None:
    """Subscribe an observer to its taps; it is called with a key, and the terms of the value (`hook_points.terms`)."""

    def look(key: str, tap: Tap) -> Look:
        def at(value: Any) -> None:
            try:
                found = terms(value, tap)
            except TypeError:
                return  # a module that passes no tensor has no rows; the request that asked for it fails when it ends
            observer(key, *found)

        return at

    for key, tap in taps.items():
        looks.setdefault(location(tap), []).append(look(key, tap))


def _ignore(key: str, *found: Tensor) -> None:
    """Ignore a value."""


def location(tap: Tap) -> str:
    """Return nnsight's name for a tap's location in a vLLM worker."""
    return f"model.{tap.module}.{tap.side}"


def _worker(observer: _Observer) -> Mediator:
    """Return a worker without code, for the whole batch, that holds a cache."""
    worker = Mediator(compile("", "<the whole batch>", "exec"), {}, {})
    worker.caches = [observer]
    worker.row = 0
    return worker
