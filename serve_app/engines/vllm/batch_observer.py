"""Shows one vLLM step's values to observers, through nnsight, once for the whole batch.

nnsight runs a worker per request and block: a thousand requests that read thirty layers park thirty thousand times a step, and
capturing every layer that way costs a third of the throughput. Its interleaver also has caches: observers to which it hands
every value of the locations they subscribe to, whole where their worker has no batch group. So in place of nnsight's table of
workers per request, `BatchWorkers` keeps one worker for the batch, which has ended and holds one such cache, and only in steps
in which somebody wants something. All else is nnsight's: the hooks, the locations, gathering what tensor parallelism has split,
and the taps that survive the replay of CUDA graphs.

What goes wrong while a value is read must not end the step, which belongs to others too. It is kept, and fails the requests
that read in that step.
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
"""Looks at the value of a location."""


class BatchInterleaver(VLLMInterleaver):
    """nnsight's interleaver, but it passes by where nobody looks: each of hundreds of modules asks three times a step."""

    def handle(self, provider: str, value: Any) -> Any:
        """Show a value at a location to whoever looks there."""
        if provider not in self.observers and not self.taps:
            return value
        return super().handle(provider, value)


class BatchWorkers(Requests):
    """nnsight's workers of one vLLM model runner: one for the whole batch, in the steps in which something is wanted."""

    def __init__(self, batch: Batch) -> None:
        """Begin without requests.

        Args:
            batch: what is wanted of them.
        """
        super().__init__()
        self._batch = batch
        self._observer: _Observer | None = None

    def add(self, new_requests: list[Any], persistent_objects: dict[str, Any]) -> None:
        """Register new requests."""
        self._batch.begin(new_requests)

    def harvest(self, finished: set[str]) -> None:
        """Forget finished requests."""
        self._batch.end(finished)

    def refuse_chunked(self, spans: list[tuple[str, int]], states: dict[str, Any]) -> None:
        """Refuse nothing: a prompt that is read in pieces gives its rows in pieces."""

    def scope(self, model: Any, spans: list[tuple[str, int]]) -> None:
        """Lay out the step that is about to run: which requests' tokens are in it, and what is wanted of them."""
        batch, step = self._batch, self._batch.lay_out(spans)
        looks: dict[str, list[Look]] = {}
        if step is not None:
            # What steers comes first: what captures then sees what the model goes on with.
            if step.steering is not None:
                steering = step.steering
                _see(looks, steering.taps, lambda key, first, *_: steering(key, first))
            if step.rows is not None:
                _see(looks, step.rows.taps, step.rows if batch.keeps else _pass_by)
            if step.scores is not None:
                scores = step.scores
                _see(looks, scores.taps, (lambda key, *found: scores(key, sum_of(found))) if batch.keeps else _pass_by)
        for recorder in batch.recorders:
            _see(looks, recorder.taps, recorder)
        interleaver = model.interleaver
        interleaver.batcher.total = sum(tokens for _, tokens in spans)
        self.nrows = len(spans)
        self._observer = _Observer(model, looks) if looks else None
        interleaver.mediators = [_worker(self._observer)] if self._observer else []
        interleaver.reindex()

    def end_step(self) -> None:
        """Hand out the rows of the step whose forward has been issued."""
        observer, self._observer = self._observer, None
        self._batch.deliver(observer.failure if observer is not None else None)


class _Observer(Cache):
    """A cache that hands values on instead of keeping them."""

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


def _see(looks: dict[str, list[Look]], taps: dict[str, Tap], observer: Callable[..., None]) -> None:
    """Have an observer look at its taps: it is called with a key, and the tensors whose sum that is (`hook_points.terms`)."""

    def look(key: str, tap: Tap) -> Look:
        def at(value: Any) -> None:
            try:
                found = terms(value, tap)
            except TypeError:
                return  # a module that passes no tensor has no rows; the request that asked is told when it ends
            observer(key, *found)

        return at

    for key, tap in taps.items():
        looks.setdefault(location(tap), []).append(look(key, tap))


def _pass_by(key: str, *found: Tensor) -> None:
    """Keep nothing of a value."""


def location(tap: Tap) -> str:
    """Return nnsight's name of a tap's location in a vLLM worker."""
    return f"model.{tap.module}.{tap.side}"


def _worker(observer: _Observer) -> Mediator:
    """Return a worker that has nothing to run, sees the whole batch, and holds a cache."""
    worker = Mediator(compile("", "<the whole batch>", "exec"), {}, {})
    worker.caches = [observer]
    worker.row = 0
    return worker
