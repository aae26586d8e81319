"""Runs many jobs through an engine and waits for their results, on a thread without an event loop.

It submits as many as the engine accepts and keeps the others back. If the caller stops early, also by Ctrl-C, the remaining
jobs are cancelled.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from queue import Empty, SimpleQueue

from serve_app.engines.protocol import (
    Engine,
    EngineBusyError,
    EngineStoppedError,
    Event,
    Failed,
    Finished,
    GenerationJob,
    RequestTooLargeError,
    UnknownTokenError,
)

JobMaker = Callable[[Callable[[Event], None]], GenerationJob]
"""Makes a job from its event callback; none of the jobs streams."""


def run_jobs(engine: Engine, makers: Mapping[int, JobMaker]) -> Iterator[tuple[int, Finished | Exception]]:
    """Run jobs; yields the number of each as it ends, with its result or the error that it failed with.

    Args:
        engine: runs them.
        makers: per number, makes the job.

    Raises:
        EngineStoppedError: if the engine is closed or dies.
    """
    events: SimpleQueue[tuple[int, Event]] = SimpleQueue()

    def emit(number: int, event: Event) -> None:
        events.put((number, event))

    jobs = {number: make(partial(emit, number)) for number, make in makers.items()}
    waiting, running = deque(jobs.items()), 0
    try:
        while waiting or running:
            try:
                while waiting:
                    engine.submit(waiting[0][1])
                    waiting.popleft()
                    running += 1
            except (RequestTooLargeError, UnknownTokenError) as error:
                yield waiting.popleft()[0], error
                continue
            except EngineBusyError:
                if not running:  # requests of others fill the queue
                    time.sleep(0.01)
                    continue
            number, event = _next(engine, events)
            running -= 1
            result = event.error if isinstance(event, Failed) else event
            if isinstance(result, EngineStoppedError):
                raise result
            assert isinstance(result, Finished | Exception)
            yield number, result
    finally:
        for job in jobs.values():
            job.cancelled.set()


def _next(engine: Engine, events: "SimpleQueue[tuple[int, Event]]") -> tuple[int, Event]:
    while True:
        try:
            return events.get(timeout=1)
        except Empty:
            if not engine.alive:
                raise EngineStoppedError("the engine's thread has died") from None
