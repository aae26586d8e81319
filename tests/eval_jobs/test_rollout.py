"""One problem against a real HTTP server: what is sent, what is scored, and whose fault a failure is."""

import pytest

from eval_jobs.endpoint import FatalRequestError
from eval_jobs.problems import Problem
from eval_jobs.rollout import RolloutPlan, run_rollout
from roentgen.runs import Sample
from tests.eval_jobs.conftest import make_plan
from tests.eval_jobs.stand_in import FOREVER, HANG_UP, Fault, StandIn

PROBLEM = Problem("arithmetic-0002", 2, "What is 4 - 1?", "4 - 1 = 3\n#### 3", "3")
SOON = {"Retry-After": "0.2"}


async def run(plan: RolloutPlan, problem: Problem = PROBLEM) -> Sample:
    async with plan.endpoint.client() as client:
        return await run_rollout(client, problem, plan)


async def test_an_answer_is_scored_by_every_extractor(server: StandIn, plan: RolloutPlan) -> None:
    sample = await run(plan)
    assert sample.identity == ("0123456789abcdef", "arithmetic-0002", 1)
    assert sample.sample_id == "gsm8k_0002"
    assert sample.correct
    assert sample.answers == {
        "answer_line": "3",
        "gsm8k_strict": None,
        "cot_strict": None,
        "flexible": "3",
        "boxed": None,
    }
    assert [message["role"] for message in sample.messages] == ["user", "assistant"]
    assert sample.response == sample.messages[-1]["content"] == "It is 3.\nAnswer: 3"
    assert (sample.prompt_tokens, sample.completion_tokens, sample.finish_reason) == (10, 5, "stop")
    assert sample.seconds > 0
    assert sample.rollouts == []
    (request,) = server.requests
    assert "activations" not in request
    assert {name: request[name] for name in plan.sampling} == plan.sampling
    assert request["model"] == "stand-in"


async def test_activations_are_asked_for_and_found(server: StandIn) -> None:
    sample = await run(make_plan(server.base_url, capture=True))
    asked = server.requests[0]["activations"]
    assert asked["session_id"] == "session"
    assert asked["key"] == {"config_hash": "0123456789abcdef", "problem_id": "arithmetic-0002", "epoch": 1, "turn": 0}
    assert asked["labels"] == {"problem_id": "arithmetic-0002", "sample_id": "gsm8k_0002", "gold": "3"}
    assert asked["layers"] == [8, 12, 16]
    assert asked["return"] == "reference"
    (rollout,) = sample.rollouts
    assert (rollout.turn, rollout.rollout_id) == (0, "rollout-arithmetic-0002")
    assert list(rollout.tensors) == ["layers.8.ln_attn", "layers.12.ln_attn", "layers.16.ln_attn"]


async def test_a_server_without_activations_stops_the_run(server: StandIn) -> None:
    server.activations = False
    with pytest.raises(FatalRequestError, match=r"returned no activations: is it a Roentgen server\?"):
        await run(make_plan(server.base_url, capture=True))


async def test_busy_and_broken_servers_are_asked_again(server: StandIn, plan: RolloutPlan) -> None:
    server.fail(PROBLEM.question, Fault(429, headers=SOON), Fault(500, headers=SOON))
    assert (await run(plan)).correct
    assert len(server.requests) == 3


async def test_a_lost_connection_is_tried_again(server: StandIn, plan: RolloutPlan) -> None:
    server.fail(PROBLEM.question, HANG_UP)
    assert (await run(plan)).correct


async def test_a_problem_the_server_fails_at_is_a_failed_sample(server: StandIn, plan: RolloutPlan) -> None:
    server.fail(PROBLEM.question, Fault(500, "poisoned", headers=SOON), times=FOREVER)
    sample = await run(plan)
    assert sample.error == "500: poisoned"
    assert not sample.correct
    assert sample.answers == {}
    assert len(server.requests) == 3


async def test_a_problem_that_always_loses_its_connection_is_a_failed_sample(
    server: StandIn, plan: RolloutPlan
) -> None:
    server.fail(PROBLEM.question, HANG_UP, times=FOREVER)
    assert "the connection was lost" in str((await run(plan)).error)


async def test_a_prompt_longer_than_the_context_is_a_failed_sample(server: StandIn, plan: RolloutPlan) -> None:
    server.fail(PROBLEM.question, Fault(400, "the context is 8 tokens", code="context_length_exceeded"))
    assert (await run(plan)).error == "400: the context is 8 tokens"
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
async def test_what_every_problem_would_meet_stops_the_run(server: StandIn, plan: RolloutPlan, status: int) -> None:
    server.fail(PROBLEM.question, Fault(status, "layer 40 is out of range"))
    with pytest.raises(FatalRequestError, match=f"refuses the request: {status}: layer 40 is out of range"):
        await run(plan)
    assert len(server.requests) == 1


async def test_a_server_that_is_gone_stops_the_run(plan: RolloutPlan) -> None:
    gone = make_plan("http://127.0.0.1:9/v1", max_retries=0)
    with pytest.raises(FatalRequestError, match="does not answer any more"):
        await run(gone)


async def test_a_server_that_takes_too_long_is_a_failed_sample(server: StandIn) -> None:
    server.latency = 1.0
    sample = await run(make_plan(server.base_url, timeout=0.2))
    assert sample.error == "no answer within 0.2 s (--request-timeout)"


@pytest.mark.parametrize(
    "body", ["", "{", "[]", "{}", '{"choices": []}', '{"choices": null}', '{"choices": [{}]}', "3", '"text"']
)
async def test_a_reply_in_another_shape_is_a_failed_sample(server: StandIn, plan: RolloutPlan, body: str) -> None:
    server.fail(PROBLEM.question, body, times=FOREVER)
    assert "the reply" in str((await run(plan)).error)


async def test_what_else_the_model_s_message_holds_is_kept(server: StandIn, plan: RolloutPlan) -> None:
    body = '{"choices": [{"message": {"role": "assistant", "content": null, "reasoning_content": "hm"}}]}'
    server.fail(PROBLEM.question, body)
    sample = await run(plan)
    assert sample.messages[-1] == {"role": "assistant", "reasoning_content": "hm"}
    assert (sample.response, sample.error, sample.completion_tokens) == ("", None, 0)
