"""Measures how a capturing vLLM worker spends its time, by timing this project's code in it.

These functions run inside the worker between two of vLLM's steps. They are sent there by pickling, which vLLM permits with
`allow_functions`.
"""

import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serve_app.engines.vllm.engine import VllmEngine

READING, STORING, WRITER = "reading", "storing", "writer"
"""On the thread that runs the model: laying out a step, reading its taps and scoring; handing rows over to the writer. And what
the writer's threads computed."""
_SPENT = "roentgen_spent"


def allow_functions() -> None:
    """Let vLLM send functions to the workers that are started from now on."""
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"


def ask(engine: "VllmEngine", function: Callable[..., Any], *args: Any) -> Any:
    """Have an engine's worker call a function with itself; returns what it gives."""
    client: Any = engine._client
    return engine._loop.run(lambda: client.collective_rpc(function, args=args))[0]


def start_clock(worker: Any) -> tuple[int, int]:
    """Put the clock around what is measured; returns how many taps there are, and the bytes of their buffers."""
    batch, spent = worker.model_runner.batch, defaultdict[str, float](float)
    setattr(batch, _SPENT, spent)
    for name in ("scope", "end_step"):
        setattr(batch, name, _timed(getattr(batch, name), READING, spent))
    own = worker.worker
    own.roentgen_scores = _timed(own.roentgen_scores, READING, spent)
    own.roentgen_sync = _timed(own.roentgen_sync, STORING, spent)
    buffers = worker.model_runner.get_model().named_buffers()
    own_bytes = (buffer.nbytes for name, buffer in buffers if name.rpartition(".")[2].startswith("roentgen_"))
    return len(batch.taps.taps), sum(own_bytes)


def read_clock(worker: Any) -> dict[str, float]:
    """Return the seconds since `start_clock`, by what they were spent on; of a thread, those that it computed."""
    found = dict(getattr(worker.model_runner.batch, _SPENT))
    found[WRITER] = 0.0
    for thread in threading.enumerate():
        if thread.name.startswith("store-") and thread.ident is not None:
            found[WRITER] += time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    return found


def _timed(function: Callable[..., Any], what: str, spent: dict[str, float]) -> Callable[..., Any]:
    def timed(*args: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args)
        finally:
            spent[what] += time.perf_counter() - start

    return timed
