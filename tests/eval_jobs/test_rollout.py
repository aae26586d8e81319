"""One problem against a real HTTP server: the requests, the scores, and the classification of failures."""

from dataclasses import replace
from typing import Any

import pytest

from eval_jobs.endpoint import FatalRequestError
from eval_jobs.problems import Problem
from eval_jobs.prompts import GSM8K_COT_ZEROSHOT
from eval_jobs.rollout import RolloutPlan, run_rollout
from eval_jobs.variants import Attempt, Variant
from roentgen.runs import Sample
from tests.eval_jobs.conftest import PLAIN, make_plan
from tests.eval_jobs.stand_in import FOREVER, HANG_UP, Fault, StandIn

PROBLEM = Problem("arithmetic-0002", 2, "What is 4 - 1?", "4 - 1 = 3\n#### 3", "3")
SOON = {"Retry-After": "0.2"}


async def run(plan: RolloutPlan, attempt: Attempt | None = None) -> Sample:
    async with plan.endpoint.client() as client:
        return await run_rollout(client, attempt or Attempt(PROBLEM, PLAIN), plan)


async def test_an_answer_is_scored_by_every_extractor(server: StandIn, plan: RolloutPlan) -> None:
    sample = await run(plan)
    assert sample.identity == ("0123456789abcdef", "arithmetic-0002", 1)
    assert sample.sample_id == "gsm8k_0002"
    assert sample.correct
    assert sample.answers == {
        "answer": "3",
        "answer_line": "3",
        "gsm8k_strict": None,
        "cot_strict": None,
        "flexible": "3",
        "boxed": None,
        "math_verify": "3",
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


@pytest.mark.parametrize("code", ["context_length_exceeded", "request_too_large", "invalid_text"])
async def test_a_prompt_that_is_too_long_or_no_text_is_a_failed_sample(
    server: StandIn, plan: RolloutPlan, code: str
) -> None:
    server.fail(PROBLEM.question, Fault(400, "not this one", code=code))
    assert (await run(plan)).error == "400: not this one"
    assert len(server.requests) == 1


async def test_a_message_that_cannot_be_sent_is_a_failed_sample(server: StandIn, plan: RolloutPlan) -> None:
    sample = await run(plan, Attempt(replace(PROBLEM, question="half \ud83d"), PLAIN))
    assert sample.error == "a message contains an unpaired surrogate, which cannot be encoded"
    assert server.requests == []


async def test_a_server_that_fails_is_not_taken_for_a_busy_one(server: StandIn, plan: RolloutPlan) -> None:
    busy: list[None] = []
    server.fail(PROBLEM.question, Fault(500, code="internal_error", headers=SOON), Fault(503, headers=SOON))
    async with plan.endpoint.client(lambda: busy.append(None)) as client:
        assert (await run_rollout(client, Attempt(PROBLEM, PLAIN), plan)).correct
    assert (len(server.requests), len(busy)) == (3, 1)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
async def test_what_every_problem_would_meet_stops_the_run(server: StandIn, plan: RolloutPlan, status: int) -> None:
    server.fail(PROBLEM.question, Fault(status, "layer 40 is out of range"))
    with pytest.raises(FatalRequestError, match=f"rejected the request: {status}: layer 40 is out of range"):
        await run(plan)
    assert len(server.requests) == 1


async def test_a_server_that_is_gone_stops_the_run(plan: RolloutPlan) -> None:
    gone = make_plan("http://127.0.0.1:9/v1", max_retries=0)
    with pytest.raises(FatalRequestError, match="no longer answers"):
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
    assert sample.messages[-1] == {"role": "assistant", "content": None, "reasoning_content": "hm"}
    assert (sample.response, sample.error, sample.completion_tokens) == ("", None, 0)


def with_tools(server: StandIn, capture: bool = False, max_turns: int = 4) -> RolloutPlan:
    return replace(make_plan(server.base_url, capture=capture), tools=("calculator",), max_turns=max_turns)


async def test_tools_are_called_until_the_model_answers(server: StandIn) -> None:
    server.calls = [
        [("a", "calculator", '{"expression": "4 - 1"}'), ("b", "calculator", '{"expression": "9**9**9"}')],
        [],
    ]
    sample = await run(with_tools(server, capture=True))
    assert [message["role"] for message in sample.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert [m["content"] for m in sample.messages if m["role"] == "tool"] == ["3", "error: too large"]
    assert [m["tool_call_id"] for m in sample.messages if m["role"] == "tool"] == ["a", "b"]
    assert sample.correct
    assert (sample.finish_reason, sample.prompt_tokens, sample.completion_tokens) == ("stop", 20, 10)
    assert [(turn.finish_reason, turn.tool_calls) for turn in sample.turns] == [("tool_calls", 2), ("stop", 0)]
    first, second = server.requests
    assert first["tools"][0]["function"]["name"] == "calculator"
    assert second["messages"] == sample.messages[:4]
    assert [request["activations"]["key"]["turn"] for request in (first, second)] == [0, 1]
    assert [request["activations"].get("since") for request in (first, second)] == [None, "turn"]
    assert [rollout.turn for rollout in sample.rollouts] == [0, 1]


@pytest.mark.parametrize(
    ("details", "cached"),
    [({"cached_tokens": 8}, 8), ({"cached_tokens": None}, 0), (None, 0), ({"audio_tokens": 1}, 0)],
)
async def test_cached_tokens_are_those_that_the_server_counts(
    server: StandIn, details: dict[str, Any] | None, cached: int
) -> None:
    server.usage = {"prompt_tokens_details": details}
    server.calls = [[("a", "calculator", '{"expression": "4 - 1"}')], []]
    sample = await run(with_tools(server))
    assert [turn.cached_tokens for turn in sample.turns] == [cached, cached]
    assert (sample.prompt_tokens, sample.cached_tokens) == (20, 2 * cached)


async def test_errors_of_tools_are_told_to_the_model(server: StandIn) -> None:
    server.calls = [[("a", "search", "{}"), ("b", "calculator", "{"), ("c", "calculator", '{"x": 1}')], []]
    sample = await run(with_tools(server))
    said = [str(m["content"]) for m in sample.messages if m["role"] == "tool"]
    assert said[0] == "error: there is no tool 'search'; there are: calculator"
    assert said[1].startswith("error: the arguments are not JSON")
    assert said[2] == 'error: the arguments must be {"expression": "…"}'
    assert sample.error is None


async def test_a_model_that_only_calls_runs_out_of_turns(server: StandIn) -> None:
    server.calls = [[("a", "calculator", '{"expression": "1"}')]] * 9
    sample = await run(with_tools(server, max_turns=3))
    assert (sample.finish_reason, len(sample.turns), sample.response) == ("max_turns", 3, "")
    assert len(server.requests) == 3
    assert not sample.correct


async def test_a_failure_in_a_later_turn_is_a_failed_sample(server: StandIn) -> None:
    server.calls = [[("a", "calculator", '{"expression": "1"}')], []]
    server.fail("1", Fault(500, "poisoned", headers=SOON), times=FOREVER)  # the question of turn 1 is the tool's answer
    sample = await run(with_tools(server))
    assert sample.error == "500: poisoned"
    assert [message["role"] for message in sample.messages] == ["user", "assistant", "tool"]


async def test_epochs_and_variants_are_samples_of_their_own(server: StandIn) -> None:
    plan = make_plan(server.base_url, capture=True)
    sample = await run(plan, Attempt(PROBLEM, Variant("calm", "No hurry.", "c4"), epoch=3))
    assert sample.identity == ("c4", "arithmetic-0002", 3)
    assert (sample.sample_id, sample.variant) == ("gsm8k_0002_e3_v-calm", "calm")
    (request,) = server.requests
    assert request["messages"][-1]["content"].startswith("No hurry.\n\nSolve")
    assert request["seed"] == plan.sampling["seed"] + 2
    assert request["activations"]["key"] == {
        "config_hash": "c4",
        "problem_id": "arithmetic-0002",
        "epoch": 3,
        "turn": 0,
    }
    assert request["activations"]["labels"]["variant"] == "calm"


async def test_a_prompt_s_stop_sequences_are_sent(server: StandIn, plan: RolloutPlan) -> None:
    await run(replace(plan, prompt=GSM8K_COT_ZEROSHOT))
    assert server.requests[0]["stop"] == ["Q:", "</s>", "<|im_end|>"]
