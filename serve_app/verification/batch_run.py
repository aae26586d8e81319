"""Runs the requests of a verification in an engine, which they join and leave in a reproducible order.

The engine's own forward passes are the clock: at every fourth one, two more requests arrive, and one request is cancelled some
forward passes after its arrival. So a verification runs in the same way on a fast and on a slow model. The batch is smaller
than the number of requests, so that its slots are reused, including the cancelled request's slot.
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue

from serve_app.engines.protocol import EngineStoppedError, Event, Failed, Finished, GenerationJob, TextDelta
from serve_app.engines.transformers.engine import TransformersEngine
from serve_app.engines.transformers.loaded_model import LoadedModel
from serve_app.verification.mix import MixRequest

IN_BATCH = 6
"""Size of the engine's batch."""

PAIR_EVERY = 4
"""Forward passes between arrivals."""

CANCEL_AFTER = 6
"""Forward passes from a request's arrival to its cancellation."""

ALIVE_CHECK_S = 5.0


@dataclass(frozen=True)
class RequestOutcome:
    """The outcome of a request: `finished`, or `error`, or neither if it was cancelled."""

    request: MixRequest
    finished: Finished | None
    error: Exception | None


def run_requests(model: LoadedModel, requests: list[MixRequest]) -> tuple[list[RequestOutcome], int]:
    """Run the requests in a separate engine, which is closed at the end.

    Returns:
        The outcomes, and the maximum number of requests that ran at the same time.

    Raises:
        EngineStoppedError: if the engine's thread dies.
    """
    module = model.observed._module
    engine = TransformersEngine(model, max_batch=IN_BATCH, max_queue=len(requests))
    run = _Run(engine, requests)
    # On the engine's thread, before each of its forwards.
    clock = module.register_forward_pre_hook(lambda *_: run.tick())
    try:
        return run.outcomes()
    finally:
        engine.close()
        clock.remove()


class _Run:
    """Submits and cancels requests at given forward passes, and collects their last events."""

    def __init__(self, engine: TransformersEngine, requests: list[MixRequest]) -> None:
        self._engine = engine
        self._requests = requests
        self._events: SimpleQueue[tuple[int, Event]] = SimpleQueue()
        self._lock = threading.Lock()
        self._forwards = 0
        self._under_way: set[int] = set()
        self._most = 0
        acts: list[tuple[int, Callable[[], None]]] = []
        for request in requests:
            arrival = PAIR_EVERY * (request.number // 2)
            job = GenerationJob(
                request.prompt_ids,
                request.sampling,
                partial(self._listen, request.number),
                request.plan,
                score_prompt=request.score_prompt,
            )
            acts.append((arrival, partial(self._submit, request.number, job)))
            if request.kind == "cancelled":
                acts.append((arrival + CANCEL_AFTER, partial(self._cancel, request.number, job)))
        self._acts = deque(sorted(acts, key=lambda act: act[0]))

    def tick(self) -> None:
        """Count a forward pass and run the actions that are due."""
        with self._lock:
            self._forwards += 1
            self._do_due()

    def outcomes(self) -> tuple[list[RequestOutcome], int]:
        """Run all requests; return their outcomes and the maximum number that ran at the same time."""
        events: dict[int, Event] = {}
        expected = sum(request.kind != "cancelled" for request in self._requests)
        self._keep_going()
        while len(events) < expected:
            try:
                number, event = self._events.get(timeout=ALIVE_CHECK_S)
            except Empty:
                if not self._engine.alive:
                    raise EngineStoppedError("the engine's thread has died") from None
            else:
                events[number] = event
                with self._lock:
                    self._under_way.discard(number)
            self._keep_going()
        return [_outcome(request, events.get(request.number)) for request in self._requests], self._most

    def _listen(self, number: int, event: Event) -> None:
        if not isinstance(event, TextDelta):
            self._events.put((number, event))

    def _submit(self, number: int, job: GenerationJob) -> None:
        self._engine.submit(job)
        self._under_way.add(number)
        self._most = max(self._most, len(self._under_way))

    def _cancel(self, number: int, job: GenerationJob) -> None:
        job.cancelled.set()
        self._under_way.discard(number)

    def _keep_going(self) -> None:
        """Advance the clock to the next action if no request runs, because an idle engine runs no forward passes."""
        with self._lock:
            if self._acts and not self._under_way:
                self._forwards = self._acts[0][0]
                self._do_due()

    def _do_due(self) -> None:
        while self._acts and self._acts[0][0] <= self._forwards:
            self._acts.popleft()[1]()


def _outcome(request: MixRequest, event: Event | None) -> RequestOutcome:
    finished = event if isinstance(event, Finished) else None
    return RequestOutcome(request, finished, event.error if isinstance(event, Failed) else None)
