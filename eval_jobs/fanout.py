"""Many rollouts at once: Ray tasks, each with a slice of the attempts and a share of the requests in flight.

A rollout is nearly all waiting, so one asyncio loop holds hundreds of them: about one task per core is enough, and a task
per problem would cost more than it does. The tasks reserve no CPU, which belongs to the model's replicas, and spread over
the nodes. Each is a streaming generator: finished samples reach the driver, and the disk, while the rest goes on. A long run
is dealt in hands, a slice to each task that ends, so that no task holds more than `SLICE` problems.

A problem's epochs and variants go to one task, one after the other, so they are asked at about the same time, while a
server's prefix cache has what they share. Where all prompts begin with the same long text, as with fixed shots, the very first
request has a head start, so that one request reads it and not all that are in flight.

`parallel` "auto" takes one task, since one that sees all requests can tell what a larger number in flight brings.

Three things can end a task before its slice is done:

- the machine: a killed process, a lost node. What it had not returned is dealt again. Only the problems that may have
  been in flight are suspects; each is dealt alone, so that one that kills its process is found out without taking others
  with it, and after `MAX_DEATHS` it becomes a failed sample.
- an `EvalError`, such as a `FatalRequestError` or a scorer that returns no verdict: the other tasks are cancelled and the
  driver raises it.
- a callback of the driver's that raises, `on_sample` or `look_up`: all tasks are cancelled.
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
"""Attempts that a task is given at most: what a long run takes of memory is then the driver's list of them and no more."""

LOOK_UP_S = 0.2
"""How long the driver may wait for samples before it looks up."""

HEAD_START_S = 1.0
"""How long the first request may be ahead of the rest: time to read some thousand tokens, and little of a run."""

LONG_PREFIX = 2_000
"""Characters at the beginning of all prompts that are worth a head start; about 500 tokens."""

COMPARED = 8
"""Prompts that are compared to find out, evenly chosen."""

MAX_DEATHS = 3
"""How many tasks a problem may take down before it is given up."""


@dataclass(frozen=True)
class Slice:
    """What one task is given."""

    attempts: tuple[Attempt, ...]
    """In the order they are started."""
    in_flight: int
    """The most requests in flight."""
    climbing: bool = False
    """Whether to start with fewer and add more while throughput grows."""
    leads: bool = False
    """Whether its first attempt is ahead of all others, those of other slices too."""

    @property
    def limit(self) -> ConcurrencyLimit:
        """How many may be in flight, as time goes on."""
        return AdaptiveLimit(most=self.in_flight) if self.climbing else FixedLimit(self.in_flight)


@dataclass(frozen=True)
class _Dealt:
    """A slice that a task has: what it has not returned yet is taken out as it returns, so that a long run grows nothing."""

    piece: Slice
    left: dict[Identity, Attempt]

    @classmethod
    def of(cls, piece: Slice) -> "_Dealt":
        return cls(piece, {attempt.identity: attempt for attempt in piece.attempts})


def evaluate(
    attempts: Sequence[Attempt],
    plan: RolloutPlan,
    parallel: int | Literal["auto"],
    on_sample: Callable[[Sample], None],
    look_up: Callable[[], None] = lambda: None,
) -> None:
    """Make every attempt once and hand each sample to `on_sample` as it finishes; needs a Ray connection.

    Args:
        attempts: what to run.
        plan: what the rollouts share.
        parallel: requests in flight, over all tasks; "auto" finds out how many are worth it.
        on_sample: called in this process, one sample at a time.
        look_up: called between two groups of samples, and every `LOOK_UP_S` seconds; it may raise to stop all.

    Raises:
        EvalError: if a rollout meets what would meet all of them.
        Exception: whatever the callbacks raise.
    """
    free = MOST if parallel == "auto" else parallel
    if parallel == "auto":
        waiting = deque([Slice(tuple(attempts), min(MOST, len(attempts)), climbing=True)])
    else:
        tasks = max(1, min(parallel, len(attempts), int(ray.cluster_resources().get("CPU", 1))))
        hands = [attempts[start : start + tasks * SLICE] for start in range(0, len(attempts), tasks * SLICE)]
        waiting = deque(piece for hand in hands for piece in deal(hand, tasks, parallel))
    if leading := free > 1 and shared_prefix(attempts, plan.prompt) >= LONG_PREFIX:
        waiting[0] = replace(waiting[0], leads=True)
    shared = _put(plan)
    running: dict[ObjectRefGenerator, _Dealt] = {}
    deaths: Counter[Identity] = Counter()
    try:
        while waiting or running:
            while waiting and waiting[0].in_flight <= free and not (leading and running):
                dealt = _Dealt.of(waiting.popleft())
                running[_run_slice.remote(dealt.piece, shared)] = dealt
                free -= dealt.piece.in_flight
            look_up()
            ready, _ = ray.wait(list(running), num_returns=1, timeout=LOOK_UP_S)
            if not ready:
                continue
            [stream] = ready
            leading = False  # its head start is over, or its task
            dealt = running[stream]
            try:
                samples: list[Sample] = ray.get(next(stream))
            except StopIteration:
                del running[stream]
                free += dealt.piece.in_flight
                continue
            except RayError as error:
                if isinstance(error, RayTaskError) and isinstance(error.cause, EvalError):
                    raise error.cause from None
                del running[stream]
                free += dealt.piece.in_flight
                samples = _bury(dealt, deaths, waiting, plan, error)
            for sample in samples:
                dealt.left.pop(sample.identity, None)  # a failed one was taken out with its task
                on_sample(sample)
    finally:
        for stream in running:
            ray.cancel(stream)


def _put(plan: RolloutPlan) -> ray.ObjectRef:
    """Put a plan where all tasks find it, with the functions of a user's own that it has.

    Raises:
        EvalError: if one holds what cannot be sent.
    """
    own = [*plan.scorers.values(), *([] if plan.prompt.pose is None else [plan.prompt.pose])]
    make_portable(*own)
    try:
        return ray.put(plan)
    except (TypeError, PicklingError) as error:  # such as a lock, a client or an open file
        names = ", ".join(map(repr, [*plan.scorers, *([] if plan.prompt.pose is None else [plan.prompt.name])]))
        why = str(error).strip().splitlines()[0]
        raise EvalError(
            f"{names} cannot be sent to Ray's tasks: {why}. Make what a function needs inside it, instead of closing over it"
        ) from error


def deal(attempts: Sequence[Attempt], tasks: int, parallel: int) -> list[Slice]:
    """Deal attempts to `tasks` slices, and `parallel` places in flight, as evenly as they go.

    A problem's attempts are dealt together, since they share a prompt or the beginning of one; those of the last problems one
    by one, so that no slice has more left than another in the end.
    """
    problems = [list(group) for _, group in groupby(attempts, key=lambda attempt: attempt.problem.problem_id)]
    whole = max(0, len(problems) - tasks)
    slices: list[list[Attempt]] = [[] for _ in range(tasks)]
    for cards in (*problems[:whole], *([attempt] for problem in problems[whole:] for attempt in problem)):
        min(slices, key=len).extend(cards)
    shares = [parallel // tasks + (number < parallel % tasks) for number in range(tasks)]
    return [Slice(tuple(dealt), share) for dealt, share in zip(slices, shares, strict=True) if dealt]


def shared_prefix(attempts: Sequence[Attempt], prompt: Prompt) -> int:
    """Return with how many characters the prompts of a run all begin, as far as a few of them tell."""
    some = attempts[:: max(1, len(attempts) // COMPARED)][:COMPARED]
    texts = [json.dumps(prompt.messages(attempt.problem, attempt.variant.prefix)) for attempt in some]
    return len(commonprefix(texts)) if len(some) > 1 else 0  # noqa: RUF071 - of texts, not of paths


@ray.remote(num_cpus=0, max_retries=0, num_returns="streaming", scheduling_strategy="SPREAD")
def _run_slice(piece: Slice, plan: RolloutPlan) -> Iterator[list[Sample]]:
    """Run a slice in one asyncio loop; yield samples in the groups in which they finish."""
    waiting = deque(piece.attempts)
    finished: asyncio.Queue[asyncio.Task[Sample]] = asyncio.Queue()
    running: set[asyncio.Task[Sample]] = set()
    limit, leads = piece.limit, piece.leads
    client = plan.endpoint.client(on_busy=limit.refused)
    with asyncio.Runner() as runner:
        # The loop stands still while a group is handed over, which takes about a millisecond.
        while waiting or running:
            while waiting and len(running) < (1 if leads else limit.value):
                task = runner.get_loop().create_task(run_rollout(client, waiting.popleft(), plan))
                task.add_done_callback(finished.put_nowait)
                running.add(task)
            if leads:
                leads = False
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
                task.result()  # raises what a rollout raised, after its neighbours are safe
        runner.run(client.close())


def _bury(
    dealt: _Dealt,
    deaths: Counter[Identity],
    waiting: "deque[Slice]",
    plan: RolloutPlan,
    error: RayError,
) -> list[Sample]:
    """Deal a dead task's attempts again, suspects first and alone; return failed samples of those given up."""
    piece, left = dealt.piece, list(dealt.left.values())
    # Attempts start in order, so those in flight are among the first; some may have finished with their task's death.
    suspects, innocent = left[: piece.in_flight], left[piece.in_flight :]
    deaths.update(attempt.identity for attempt in suspects)
    given_up = [attempt for attempt in suspects if deaths[attempt.identity] >= MAX_DEATHS]
    again = [Slice((attempt,), 1) for attempt in suspects if deaths[attempt.identity] < MAX_DEATHS]
    if innocent:
        again.append(replace(piece, attempts=tuple(innocent)))
    waiting.extendleft(reversed(again))
    reason = f"its task died {MAX_DEATHS} times: {str(error).strip().splitlines()[-1]}"
    return [failed_sample(attempt, plan, reason) for attempt in given_up]
