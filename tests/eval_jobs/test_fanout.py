"""Many rollouts on a real local Ray: every problem once, however the tasks end."""

import time
from dataclasses import replace
from typing import Literal

import pytest

from eval_jobs.concurrency import START
from eval_jobs.endpoint import FatalRequestError
from eval_jobs.fanout import HEAD_START_S, LONG_PREFIX, MAX_CRASHES, evaluate, shared_prefix, split_attempts
from eval_jobs.problems import Problem
from eval_jobs.prompts import ANSWER_LINE, GSM8K, GSM8K_COT
from eval_jobs.rollout import RolloutPlan
from eval_jobs.variants import Attempt
from roentgen.runs import Sample
from tests.eval_jobs.conftest import PLAIN, attempts_at, take
from tests.eval_jobs.stand_in import FOREVER, KILL, Fault, StandIn, question_of

pytestmark = pytest.mark.usefixtures("local_ray")


def run(problems: list[Problem], plan: RolloutPlan, parallel: int | Literal["auto"]) -> list[Sample]:
    samples: list[Sample] = []
    evaluate(attempts_at(problems), plan, parallel, samples.append)
    return samples


def assert_each_once(samples: list[Sample], problems: list[Problem]) -> None:
    assert sorted(sample.problem_id for sample in samples) == [problem.problem_id for problem in problems]


def test_problems_and_places_are_dealt_evenly(problems: list[Problem]) -> None:
    slices = split_attempts(attempts_at(problems), tasks=5, parallel=7)
    assert [piece.in_flight for piece in slices] == [2, 2, 1, 1, 1]
    assert [len(piece.attempts) for piece in slices] == [3, 3, 2, 2, 2]
    assert {attempt.problem for piece in slices for attempt in piece.attempts} == set(problems)


def attempts_by_problem(problems: list[Problem], epochs: int) -> list[Attempt]:
    return [Attempt(problem, PLAIN, epoch) for problem in problems for epoch in range(1, epochs + 1)]


@pytest.mark.parametrize(
    ("taken", "epochs", "tasks"), [(12, 3, 2), (12, 1, 5), (11, 4, 3), (1, 9, 4), (2, 7, 4), (5, 2, 5)]
)
def test_a_problem_s_attempts_are_dealt_together(problems: list[Problem], taken: int, epochs: int, tasks: int) -> None:
    attempts = attempts_by_problem(problems[:taken], epochs)
    slices = split_attempts(attempts, tasks, parallel=8)
    sizes = [len(piece.attempts) for piece in slices]
    assert max(sizes) - min(sizes) <= 1
    assert sorted(attempt.sample_id for piece in slices for attempt in piece.attempts) == sorted(
        a.sample_id for a in attempts
    )
    for piece in slices:
        assert [attempts.index(attempt) for attempt in piece.attempts] == sorted(map(attempts.index, piece.attempts))
    for problem in problems[: max(0, taken - tasks)]:
        assert sum(problem in {attempt.problem for attempt in piece.attempts} for piece in slices) == 1


def test_slices_stay_even_where_problems_lack_different_numbers_of_attempts(problems: list[Problem]) -> None:
    """As in a continued or extended run."""
    attempts = [
        Attempt(problem, PLAIN, epoch) for n, problem in enumerate(problems) for epoch in range(1, 2 + 6 * (n % 2))
    ]
    sizes = [len(piece.attempts) for piece in split_attempts(attempts, tasks=2, parallel=2)]
    assert sum(sizes) == len(attempts)
    assert max(sizes) - min(sizes) <= 1


def test_requests_go_out_problem_by_problem(server: StandIn, plan: RolloutPlan, problems: list[Problem]) -> None:
    attempts = attempts_by_problem(problems[:4], 3)
    evaluate(attempts, plan, 1, lambda _: None)
    asked = [(question_of(body), body["seed"]) for body in server.requests]
    assert asked == [(attempt.problem.question, attempt.epoch - 1) for attempt in attempts]


def long_prompts(plan: RolloutPlan) -> RolloutPlan:
    """Prompts that all begin with the same long text."""
    return replace(plan, prompt=replace(plan.prompt, user="Be brief. " * (LONG_PREFIX // 10) + plan.prompt.user))


@pytest.mark.parametrize("parallel", [4, "auto"])
def test_the_first_of_a_shared_prefix_has_a_head_start(
    server: StandIn, plan: RolloutPlan, problems: list[Problem], parallel: int | Literal["auto"]
) -> None:
    server.latency = 6 * HEAD_START_S
    assert_each_once(run(problems[:4], long_prompts(plan), parallel), problems[:4])
    first, second, third, _ = server.arrived
    assert question_of(server.requests[0]) == problems[0].question
    assert HEAD_START_S * 0.9 < second - first < server.latency  # and it is waited for no longer
    assert third - second < server.latency * 0.9  # only the first is ahead of the others


def test_who_answers_soon_is_waited_for_no_longer(server: StandIn, plan: RolloutPlan, problems: list[Problem]) -> None:
    assert_each_once(run(problems, long_prompts(plan), 2), problems)
    assert server.arrived[1] - server.arrived[0] < HEAD_START_S * 0.9


def test_prompts_that_share_little_have_no_head_start(
    server: StandIn, plan: RolloutPlan, problems: list[Problem]
) -> None:
    server.latency = HEAD_START_S
    run(problems[:4], plan, 4)
    assert server.arrived[1] - server.arrived[0] < HEAD_START_S * 0.9


def test_a_first_request_that_kills_its_worker_holds_up_nobody(
    server: StandIn, plan: RolloutPlan, problems: list[Problem]
) -> None:
    server.fail(problems[0].question, KILL)
    assert_each_once(run(problems, long_prompts(plan), 4), problems)


def test_what_a_run_s_prompts_share(problems: list[Problem]) -> None:
    assert (
        shared_prefix(attempts_at(problems), GSM8K_COT)
        > LONG_PREFIX
        > shared_prefix(attempts_at(problems), ANSWER_LINE)
    )
    assert shared_prefix(attempts_at(problems[:1]), GSM8K_COT) == 0
    epochs = [Attempt(problems[0], PLAIN, epoch) for epoch in (1, 2)]
    assert shared_prefix(epochs, GSM8K_COT) > shared_prefix(attempts_at(problems[:2]), GSM8K_COT)
    drawn = [replace(problem, shots=tuple(problems[n : n + 5])) for n, problem in enumerate(problems[:7])]
    assert shared_prefix(attempts_at(drawn), GSM8K) < 100


@pytest.mark.parametrize("parallel", [1, 5, 64])
def test_every_problem_once(server: StandIn, plan: RolloutPlan, problems: list[Problem], parallel: int) -> None:
    server.latency = 0.05
    samples = run(problems, plan, parallel)
    assert_each_once(samples, problems)
    assert all(sample.correct for sample in samples)
    most = min(parallel, len(problems))
    assert most / 2 <= server.most_in_flight <= most  # half, where one of the two workers was still starting


def test_a_long_run_is_dealt_in_hands(
    server: StandIn, plan: RolloutPlan, problems: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval_jobs.fanout.SLICE", 2)
    server.fail(problems[5].question, KILL)
    assert_each_once(run(problems, plan, 5), problems)
    assert server.most_in_flight <= 5


def test_as_many_in_flight_as_the_server_can_take(server: StandIn, plan: RolloutPlan) -> None:
    problems = take("arithmetic", 60)
    server.latency = 0.05  # however many it is asked, so more are always faster
    assert_each_once(run(problems, plan, "auto"), problems)
    assert server.most_in_flight > START


def test_nothing_to_do(plan: RolloutPlan) -> None:
    assert run([], plan, 4) == []


def test_samples_arrive_while_others_run(server: StandIn, plan: RolloutPlan, problems: list[Problem]) -> None:
    server.latency = 0.2
    arrivals: list[float] = []
    evaluate(attempts_at(problems), plan, 2, lambda sample: arrivals.append(time.monotonic()))
    assert arrivals[-1] - arrivals[0] > 0.7  # six rounds of 0.2 s


def test_a_poisoned_problem_costs_no_other(server: StandIn, plan: RolloutPlan, problems: list[Problem]) -> None:
    server.fail(problems[3].question, Fault(500, "poisoned", headers={"Retry-After": "0.1"}), times=FOREVER)
    samples = run(problems, plan, 4)
    assert_each_once(samples, problems)
    assert [sample.problem_id for sample in samples if sample.error] == [problems[3].problem_id]


def test_a_killed_worker_s_problems_are_dealt_again(
    server: StandIn, plan: RolloutPlan, problems: list[Problem]
) -> None:
    server.latency = 0.05
    server.fail(problems[4].question, KILL)
    samples = run(problems, plan, 4)
    assert_each_once(samples, problems)
    assert not any(sample.error for sample in samples)
    assert server.questions().count(problems[4].question) == 2


def test_a_problem_that_kills_every_worker_is_given_up_alone(
    server: StandIn, plan: RolloutPlan, problems: list[Problem]
) -> None:
    server.latency = 0.05
    server.fail(problems[0].question, KILL, times=FOREVER)
    samples = run(problems, plan, 4)
    assert_each_once(samples, problems)
    (failed,) = [sample for sample in samples if sample.error]
    assert failed.problem_id == problems[0].problem_id
    assert f"its task died {MAX_CRASHES} times" in str(failed.error)
    assert server.questions().count(problems[0].question) == MAX_CRASHES


def test_a_refused_request_stops_everything_and_keeps_what_is_done(
    server: StandIn, plan: RolloutPlan, problems: list[Problem]
) -> None:
    server.latency = 0.1
    server.fail(problems[6].question, Fault(400, "layer 40 is out of range"))
    samples: list[Sample] = []
    with pytest.raises(FatalRequestError, match="layer 40 is out of range") as caught:
        evaluate(attempts_at(problems), plan, 2, samples.append)
    assert type(caught.value) is FatalRequestError
    assert 3 <= len(samples) < 12
    time.sleep(0.5)
    asked = len(server.requests)
    time.sleep(0.5)
    assert len(server.requests) == asked < 12  # the other task was cancelled too


def test_an_error_in_the_driver_cancels_the_tasks(server: StandIn, plan: RolloutPlan, problems: list[Problem]) -> None:
    server.latency = 0.2

    def full(sample: Sample) -> None:
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        evaluate(attempts_at(problems), plan, 2, full)
    time.sleep(0.5)
    asked = len(server.requests)
    time.sleep(0.6)
    assert len(server.requests) == asked < 12
