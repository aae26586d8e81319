"""Many rollouts at once: Ray tasks, each with a slice of the problems and a share of the requests in flight.

A rollout is nearly all waiting, so one asyncio loop holds hundreds of them: about one task per core is enough, and a task
per problem would cost more than it does. The tasks reserve no CPU, which belongs to the model's replicas, and spread over
the nodes. Each is a streaming generator: finished samples reach the driver, and the disk, while the rest goes on.

Three things can end a task before its slice is done:

- the machine: a killed process, a lost node. What it had not returned is dealt again. Only the problems that may have
  been in flight are suspects; each is dealt alone, so that one that kills its process is found out without taking others
  with it, and after `MAX_DEATHS` it becomes a failed sample.
- a `FatalRequestError`: the other tasks are cancelled and the driver raises it.
- Ctrl-C in the driver: all tasks are cancelled.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import ray
from ray import ObjectRefGenerator
from ray.exceptions import RayError, RayTaskError

from eval_jobs.endpoint import FatalRequestError
from eval_jobs.problems import Problem
from eval_jobs.rollout import RolloutPlan, failed_sample, run_rollout
from roentgen.runs import Sample

MAX_DEATHS = 3
"""How many tasks a problem may take down before it is given up."""


@dataclass(frozen=True)
class Slice:
    """What one task is given.

    Attributes:
        problems: in the order they are started.
        in_flight: how many at once.
    """

    problems: tuple[Problem, ...]
    in_flight: int


def evaluate(
    problems: Sequence[Problem], plan: RolloutPlan, parallel: int, on_sample: Callable[[Sample], None]
) -> None:
    """Run every problem once and hand each sample to `on_sample` as it finishes; needs a Ray connection.

    Args:
        problems: what to run.
        plan: what the rollouts share.
        parallel: requests in flight, over all tasks.
        on_sample: called in this process, one sample at a time.

    Raises:
        FatalRequestError: if a rollout meets what would meet all of them.
    """
    tasks = max(1, min(parallel, len(problems), int(ray.cluster_resources().get("CPU", 1))))
    waiting = deque(deal(problems, tasks, parallel))
    running: dict[ObjectRefGenerator, Slice] = {}
    returned: set[str] = set()
    deaths: Counter[str] = Counter()
    free = parallel
    try:
        while waiting or running:
            while waiting and waiting[0].in_flight <= free:
                piece = waiting.popleft()
                running[_run_slice.remote(piece, plan)] = piece
                free -= piece.in_flight
            [stream], _ = ray.wait(list(running), num_returns=1)
            try:
                samples: list[Sample] = ray.get(next(stream))
            except StopIteration:
                free += running.pop(stream).in_flight
                continue
            except RayError as error:
                if isinstance(error, RayTaskError) and isinstance(error.cause, FatalRequestError):
                    raise error.cause from None
                piece = running.pop(stream)
                free += piece.in_flight
                samples = _bury(piece, returned, deaths, waiting, plan, error)
            for sample in samples:
                returned.add(sample.problem_id)
                on_sample(sample)
    finally:
        for stream in running:
            ray.cancel(stream)


def deal(problems: Sequence[Problem], tasks: int, parallel: int) -> list[Slice]:
    """Deal problems like cards to `tasks` slices, and `parallel` places in flight as evenly as they go."""
    shares = [parallel // tasks + (number < parallel % tasks) for number in range(tasks)]
    return [Slice(tuple(problems[number::tasks]), share) for number, share in enumerate(shares)]


@ray.remote(num_cpus=0, max_retries=0, num_returns="streaming", scheduling_strategy="SPREAD")
def _run_slice(piece: Slice, plan: RolloutPlan) -> Iterator[list[Sample]]:
    """Run a slice in one asyncio loop; yield samples in the groups in which they finish."""
    waiting = deque(piece.problems)
    pending: set[asyncio.Task[Sample]] = set()
    client = plan.endpoint.client()
    with asyncio.Runner() as runner:
        # The loop stands still while a group is handed over, which takes about a millisecond.
        while waiting or pending:
            while waiting and len(pending) < piece.in_flight:
                pending.add(runner.get_loop().create_task(run_rollout(client, waiting.popleft(), plan)))
            done, pending = runner.run(asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED))
            yield [task.result() for task in done if task.exception() is None]
            for task in done:
                task.result()  # raises what a rollout raised, after its neighbours are safe
        runner.run(client.close())


def _bury(
    piece: Slice,
    returned: set[str],
    deaths: Counter[str],
    waiting: "deque[Slice]",
    plan: RolloutPlan,
    error: RayError,
) -> list[Sample]:
    """Deal a dead task's problems again, suspects first and alone; return failed samples of those given up."""
    left = [problem for problem in piece.problems if problem.problem_id not in returned]
    # Problems start in order, so those in flight are among the first; some may have finished with their task's death.
    suspects, innocent = left[: piece.in_flight], left[piece.in_flight :]
    deaths.update(problem.problem_id for problem in suspects)
    given_up = [problem for problem in suspects if deaths[problem.problem_id] >= MAX_DEATHS]
    again = [Slice((problem,), 1) for problem in suspects if deaths[problem.problem_id] < MAX_DEATHS]
    if innocent:
        again.append(Slice(tuple(innocent), piece.in_flight))
    waiting.extendleft(reversed(again))
    reason = f"its task died {MAX_DEATHS} times: {str(error).strip().splitlines()[-1]}"
    return [failed_sample(problem, plan, reason) for problem in given_up]
