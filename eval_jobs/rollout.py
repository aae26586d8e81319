"""One problem against the server: messages, one request, a scored `Sample`.

When activations are collected, the request carries what to keep and the rollout's key, and the reply says where it is; the
server answers only after the activations are durable, so a sample never points at nothing.

What can go wrong falls in two kinds. What concerns this problem only (a prompt longer than the context, a server that
fails at it again and again) becomes a sample with `error`, which is tried again when the run is resumed. What would meet
every problem alike (wrong key, unknown model, a layer that does not exist, a server that is gone) is a
`FatalRequestError`: going on would only turn a typing error into a thousand failed samples.
"""

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from openai import APIConnectionError, APIError, APIStatusError, APITimeoutError, AsyncOpenAI
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from eval_jobs.endpoint import Endpoint, FatalRequestError, server_message
from eval_jobs.problems import Problem
from eval_jobs.prompts import PROMPTS
from eval_jobs.scoring import score
from roentgen.contract import ActivationReply, ActivationRequest, RolloutKey
from roentgen.runs import RolloutRef, Sample

CONFIGURATION_ERRORS = frozenset({400, 401, 403, 404, 422})
"""Statuses that blame the request's form, which all problems share."""

TOO_LONG = "context_length_exceeded"
"""The one code of a 400 that blames the problem."""


class _Message(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: str = "assistant"
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Reply(BaseModel):
    """What is read of a reply. The SDK's own types are not checked, and compatible servers differ."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None
    activations: Any = None


@dataclass(frozen=True)
class RolloutPlan:
    """What all rollouts of a run share; it travels to every Ray task.

    Attributes:
        endpoint: the server.
        model: the name to ask for.
        prompt: a name in `PROMPTS`.
        sampling: parameters of the request.
        extractor: whose verdict is the sample's.
        config_hash: the configuration's.
        capture: what to keep of the activations, and in which session; None keeps nothing.
    """

    endpoint: Endpoint
    model: str
    prompt: str
    sampling: dict[str, Any]
    extractor: str
    config_hash: str
    capture: ActivationRequest | None = None


async def run_rollout(client: AsyncOpenAI, problem: Problem, plan: RolloutPlan) -> Sample:
    """Pose a problem and score the reply.

    Raises:
        FatalRequestError: if every other problem would fail in the same way.
    """
    started = time.monotonic()
    messages: list[Any] = PROMPTS[plan.prompt].messages(problem.question)
    try:
        async with asyncio.timeout(plan.endpoint.timeout):  # over all retries
            answer = await client.chat.completions.with_raw_response.create(
                model=plan.model, messages=messages, extra_body=_activations(problem, plan), **plan.sampling
            )
        reply = _Reply.model_validate_json(answer.content)
    except (TimeoutError, APITimeoutError):
        return failed_sample(problem, plan, f"no answer within {plan.endpoint.timeout:g} s (--request-timeout)")
    except APIConnectionError as error:
        await _check_alive(client, plan.endpoint)
        return failed_sample(problem, plan, f"the connection was lost: {error.__cause__ or error}")
    except APIStatusError as error:
        if error.status_code in CONFIGURATION_ERRORS and error.code != TOO_LONG:
            raise FatalRequestError(f"the server refuses the request: {server_message(error)}") from error
        return failed_sample(problem, plan, server_message(error))
    except ValidationError as error:  # a 200 that is not JSON, or JSON of another shape
        return failed_sample(problem, plan, f"the reply cannot be read: {error.errors()[0]['msg']}")
    return _scored_sample(reply, problem, plan, messages, time.monotonic() - started)


def failed_sample(problem: Problem, plan: RolloutPlan, error: str) -> Sample:
    """Return the sample of a problem that got no answer."""
    return Sample(**_identity(problem, plan), messages=PROMPTS[plan.prompt].messages(problem.question), error=error)


def sample_id(problem: Problem) -> str:
    """Return what names a sample's files."""
    return f"gsm8k_{problem.number:04d}"


def _identity(problem: Problem, plan: RolloutPlan) -> dict[str, Any]:
    return {
        "sample_id": sample_id(problem),
        "problem_id": problem.problem_id,
        "config_hash": plan.config_hash,
        "question": problem.question,
        "solution": problem.solution,
        "gold": problem.gold,
    }


def _activations(problem: Problem, plan: RolloutPlan) -> dict[str, Any] | None:
    """Return the request's `extra_body`: what to keep, and the key and labels that join it to this sample."""
    if plan.capture is None:
        return None
    key = RolloutKey(config_hash=plan.config_hash, problem_id=problem.problem_id)
    labels = {"problem_id": problem.problem_id, "sample_id": sample_id(problem), "gold": problem.gold}
    request = plan.capture.model_copy(update={"key": key, "labels": labels})
    return {"activations": request.model_dump(mode="json", by_alias=True)}


async def _check_alive(client: AsyncOpenAI, endpoint: Endpoint) -> None:
    """Find out whose fault a lost connection was: the problem's, or the server's.

    Raises:
        FatalRequestError: if the server does not answer at all.
    """
    try:
        await client.with_options(max_retries=len(endpoint.urls), timeout=endpoint.timeout).models.list()
    except APIConnectionError as error:
        raise FatalRequestError(f"the server at {endpoint.base_url} does not answer any more") from error
    except APIError:
        return  # it answers, if only to complain


def _scored_sample(reply: _Reply, problem: Problem, plan: RolloutPlan, messages: list[Any], seconds: float) -> Sample:
    choice, usage = reply.choices[0], reply.usage or _Usage()
    response = choice.message.content or ""
    scores = score(response, problem.gold)
    return Sample(
        **_identity(problem, plan),
        messages=[*messages, choice.message.model_dump(exclude_none=True)],
        response=response,
        answers=scores.answers,
        correct_by=scores.correct_by,
        correct=scores.correct_by[plan.extractor],
        finish_reason=choice.finish_reason,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        seconds=seconds,
        rollouts=[_rollout(reply.activations, plan)] if plan.capture else [],
    )


def _rollout(found: Any, plan: RolloutPlan) -> RolloutRef:
    """Read where the activations are.

    Raises:
        FatalRequestError: if they were asked for and the reply has none.
    """
    if found is None:
        raise FatalRequestError(
            f"the server at {plan.endpoint.base_url} returned no activations: is it a Roentgen server?"
        )
    try:
        return RolloutRef(turn=0, **ActivationReply.model_validate(found).model_dump())
    except ValidationError as error:
        raise FatalRequestError(f"the reply's 'activations' cannot be read: {error}") from error
