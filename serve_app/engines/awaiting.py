"""Runs many jobs through an engine and waits for them here, where no event loop runs.

As many are submitted as the engine takes; the others wait outside. Leaving early, also by Ctrl-C, cancels what is left.
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
"""Makes a job of the listener that is to hear of it; none of them streams."""


def results_of(engine: Engine, makers: Mapping[int, JobMaker]) -> Iterator[tuple[int, Finished | Exception]]:
    """Have an engine run jobs; yields each one's number with its result, or why there is none, as they end.

    Args:
        engine: runs them.
        makers: what makes each, by number.

    Raises:
        EngineStoppedError: if the engine is closed or dies.
    """
    heard: SimpleQueue[tuple[int, Event]] = SimpleQueue()

    def tell(number: int, event: Event) -> None:
        heard.put((number, event))

    jobs = {number: make(partial(tell, number)) for number, make in makers.items()}
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
                if not running:  # others fill the queue
                    time.sleep(0.01)
                    continue
            number, event = _next(engine, heard)
            running -= 1
            result = event.error if isinstance(event, Failed) else event
            if isinstance(result, EngineStoppedError):
                raise result
            assert isinstance(result, Finished | Exception)
            yield number, result
    finally:
        for job in jobs.values():
            job.cancelled.set()


def _next(engine: Engine, heard: "SimpleQueue[tuple[int, Event]]") -> tuple[int, Event]:
    while True:
        try:
            return heard.get(timeout=1)
        except Empty:
            if not engine.alive:
                raise EngineStoppedError("the engine's thread has died") from None
