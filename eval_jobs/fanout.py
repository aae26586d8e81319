"""Runs many rollouts at once as Ray tasks. Each task has a slice of the attempts and a share of the requests in flight.

A rollout spends nearly all its time waiting, so one asyncio loop runs hundreds of them: one task per core is enough, and
one task per problem would cost more than the rollout itself. The tasks reserve no CPU, which the model's replicas need, and
spread over the nodes. Each task is a streaming generator: finished samples reach the driver, and the disk, while the rest
continues. A long run is split into slices of at most `SLICE` attempts, which bounds the memory of a task.

All epochs and variants of a problem go to one task, one after the other. Their requests then arrive at about the same time,
while the server's prefix cache still holds their common prefix. If all prompts begin with the same long text, as with fixed
shots, the first request gets a head start, so that one request fills the prefix cache instead of all that are in flight.

`parallel="auto"` uses a single task, because only a task that sees all requests can measure how throughput grows with
concurrency.

Three events end a task before its slice is done:

- A killed process or a lost node. The attempts that the task had not returned are requeued. Those that may have been in
  flight are requeued alone, so that an attempt that crashes its process is identified without failing others; after
  `MAX_CRASHES` crashes it becomes a failed sample.
- An `EvalError`, such as a `FatalRequestError` or a scorer that returns no verdict. The driver cancels the other tasks and
  raises the error.
- An exception in one of the driver's callbacks, `on_sample` or `check_stop`. The driver cancels all tasks.
"""

import asyncio
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from os.path import commonprefix
from pickle import PicklingError
from typing import Literal

import ray
from ray import ObjectRefGenerator
from ray.exceptions import RayError, RayTaskError

from eval_jobs import EvalError
from eval_jobs.concurrency import MOST, AdaptiveLimit, ConcurrencyLimit, FixedLimit
from eval_jobs.prompts import Prompt
from eval_jobs.rollout import RolloutPlan, failed_sample, run_rollout
from eval_jobs.variants import Attempt
from roentgen.extensions import make_portable
from roentgen.runs import Sample

Identity = tuple[str, str, int]

SLICE = 10_000
"""Maximum attempts of a task; the driver's list of attempts then dominates the memory of a long run."""

CHECK_INTERVAL_S = 0.2
"""Seconds that the driver waits for samples between two calls of `check_stop`."""

HEAD_START_S = 1.0
"""Head start of the first request in seconds: long enough to prefill some thousand tokens, short compared with a run."""

LONG_PREFIX = 2_000
"""Length in characters of a common prefix that justifies a head start; about 500 tokens."""

COMPARED = 8
"""Number of prompts, evenly spaced, whose common prefix is measured."""

MAX_CRASHES = 3
"""Number of task crashes after which an attempt is given up."""


@dataclass(frozen=True)
class Slice:
    """The work of one task."""

    attempts: tuple[Attempt, ...]
    """The attempts, in the order in which they are started."""
    in_flight: int
    """Maximum requests in flight."""
    climbing: bool = False
    """True to start with fewer requests and add more while throughput grows."""
    goes_first: bool = False
    """True if its first attempt gets a head start over all others, including those of other slices."""

    @property
    def limit(self) -> ConcurrencyLimit:
        """A new concurrency limit for the slice."""
        return AdaptiveLimit(most=self.in_flight) if self.climbing else FixedLimit(self.in_flight)


@dataclass(frozen=True)
class _RunningSlice:
    """A slice in execution. `left` shrinks as the task returns samples, so that memory does not grow with the run."""

    piece: Slice
    left: dict[Identity, Attempt]

    @classmethod
    def of(cls, piece: Slice) -> "_RunningSlice":
        return cls(piece, {attempt.identity: attempt for attempt in piece.attempts})


def evaluate(
    attempts: Sequence[Attempt],
    plan: RolloutPlan,
    parallel: int | Literal["auto"],
    on_sample: Callable[[Sample], None],
    check_stop: Callable[[], None] = lambda: None,
) -> None:
    """Run every attempt once and pass each sample to `on_sample` as it finishes. Requires a Ray connection.

    Args:
        attempts: what to run.
        plan: what the rollouts share.
        parallel: requests in flight over all tasks; "auto" adapts the number to the throughput.
        on_sample: called in this process, one sample at a time.
        check_stop: called between two groups of samples, and every `CHECK_INTERVAL_S` seconds; an exception stops the run.

    Raises:
        EvalError: if a rollout fails for a reason that all rollouts share.
        Exception: whatever the callbacks raise.
    """
    free = MOST if parallel == "auto" else parallel
    if parallel == "auto":
        waiting = deque([Slice(tuple(attempts), min(MOST, len(attempts)), climbing=True)])
    else:
        tasks = max(1, min(parallel, len(attempts), int(ray.cluster_resources().get("CPU", 1))))
        chunks = [attempts[start : start + tasks * SLICE] for start in range(0, len(attempts), tasks * SLICE)]
        waiting = deque(piece for chunk in chunks for piece in split_attempts(chunk, tasks, parallel))
    if head_start := free > 1 and shared_prefix(attempts, plan.prompt) >= LONG_PREFIX:
        waiting[0] = replace(waiting[0], goes_first=True)
    shared = _put(plan)
    running: dict[ObjectRefGenerator, _RunningSlice] = {}
    crash_counts: Counter[Identity] = Counter()
    try:
        while waiting or running:
            while waiting and waiting[0].in_flight <= free and not (head_start and running):
                started = _RunningSlice.of(waiting.popleft())
                running[_run_slice.remote(started.piece, shared)] = started
                free -= started.piece.in_flight
            check_stop()
            ready, _ = ray.wait(list(running), num_returns=1, timeout=CHECK_INTERVAL_S)
            if not ready:
                continue
            [stream] = ready
            head_start = False  # the head start or its task has ended
            current = running[stream]
            try:
                samples: list[Sample] = ray.get(next(stream))
            except StopIteration:
                del running[stream]
                free += current.piece.in_flight
                continue
            except RayError as error:
                if isinstance(error, RayTaskError) and isinstance(error.cause, EvalError):
                    raise error.cause from None
                del running[stream]
                free += current.piece.in_flight
                samples = _requeue_after_task_death(current, crash_counts, waiting, plan, error)
            for sample in samples:
                current.left.pop(sample.identity, None)  # a failed sample was removed together with its task
                on_sample(sample)
    finally:
        for stream in running:
            ray.cancel(stream)


def _put(plan: RolloutPlan) -> ray.ObjectRef:
    """Put a plan into Ray's object store, with the user's own functions that it contains.

    Raises:
        EvalError: if one of them cannot be pickled.
    """
    own = [*plan.scorers.values(), *([] if plan.prompt.pose is None else [plan.prompt.pose])]
    make_portable(*own)
    try:
        return ray.put(plan)
    except (TypeError, PicklingError) as error:  # such as a lock, a client or an open file
        names = ", ".join(map(repr, [*plan.scorers, *([] if plan.prompt.pose is None else [plan.prompt.name])]))
        why = str(error).strip().splitlines()[0]
        raise EvalError(
            f"{names} cannot be sent to Ray's tasks: {why}. Create such objects inside the function, not outside it"
        ) from error


def split_attempts(attempts: Sequence[Attempt], tasks: int, parallel: int) -> list[Slice]:
    """Split attempts, and `parallel` requests in flight, evenly over `tasks` slices.

    A problem's attempts stay together, since they share a prompt or its beginning. The attempts of the last problems are
    split one by one, so that the slices end at about the same time.
    """
    problems = [list(group) for _, group in groupby(attempts, key=lambda attempt: attempt.problem.problem_id)]
    whole = max(0, len(problems) - tasks)
    slices: list[list[Attempt]] = [[] for _ in range(tasks)]
    for group in (*problems[:whole], *([attempt] for problem in problems[whole:] for attempt in problem)):
        min(slices, key=len).extend(group)
    shares = [parallel // tasks + (number < parallel % tasks) for number in range(tasks)]
    return [Slice(tuple(own), share) for own, share in zip(slices, shares, strict=True) if own]


def shared_prefix(attempts: Sequence[Attempt], prompt: Prompt) -> int:
    """Return the length in characters of the prompts' common prefix, estimated from a few of them."""
    some = attempts[:: max(1, len(attempts) // COMPARED)][:COMPARED]
    texts = [json.dumps(prompt.messages(attempt.problem, attempt.variant.prefix)) for attempt in some]
    return len(commonprefix(texts)) if len(some) > 1 else 0  # noqa: RUF071 - of texts, not of paths


@ray.remote(num_cpus=0, max_retries=0, num_returns="streaming", scheduling_strategy="SPREAD")
def _run_slice(piece: Slice, plan: RolloutPlan) -> Iterator[list[Sample]]:
    """Run a slice in one asyncio loop and yield samples in the groups in which they finish."""
    waiting = deque(piece.attempts)
    finished: asyncio.Queue[asyncio.Task[Sample]] = asyncio.Queue()
    running: set[asyncio.Task[Sample]] = set()
    limit, goes_first = piece.limit, piece.goes_first
    client = plan.endpoint.client(on_busy=limit.refused)
    with asyncio.Runner() as runner:
        # The loop is suspended while a group is handed over, for about a millisecond.
        while waiting or running:
            while waiting and len(running) < (1 if goes_first else limit.value):
                task = runner.get_loop().create_task(run_rollout(client, waiting.popleft(), plan))
                task.add_done_callback(finished.put_nowait)
                running.add(task)
            if goes_first:
                goes_first = False
                runner.run(asyncio.wait(running, timeout=HEAD_START_S))
                yield []
                continue
            done = [runner.run(finished.get())]
            while not finished.empty():
                done.append(finished.get_nowait())
            running.difference_update(done)
            samples = [task.result() for task in done if task.exception() is None]
            for sample in samples:
                limit.finished(sample.completion_tokens, time.monotonic())
            yield samples
            for task in done:
                task.result()  # raises a rollout's exception, after the other samples have been yielded
        runner.run(client.close())


def _requeue_after_task_death(
    ended: _RunningSlice,
    crash_counts: Counter[Identity],
    waiting: "deque[Slice]",
    plan: RolloutPlan,
    error: RayError,
) -> list[Sample]:
    """Requeue a dead task's attempts, those that may have been in flight first and alone; return samples of the attempts
    given up."""
    piece, left = ended.piece, list(ended.left.values())
    # Attempts start in order, so those in flight are among the first of the remaining ones. Some may have finished
    # unreported.
    possibly_in_flight, not_started = left[: piece.in_flight], left[piece.in_flight :]
    crash_counts.update(attempt.identity for attempt in possibly_in_flight)
    failed = [attempt for attempt in possibly_in_flight if crash_counts[attempt.identity] >= MAX_CRASHES]
    again = [Slice((attempt,), 1) for attempt in possibly_in_flight if crash_counts[attempt.identity] < MAX_CRASHES]
    if not_started:
        again.append(replace(piece, attempts=tuple(not_started)))
    waiting.extendleft(reversed(again))
    reason = f"its task died {MAX_CRASHES} times: {str(error).strip().splitlines()[-1]}"
    return [failed_sample(attempt, plan, reason) for attempt in failed]
