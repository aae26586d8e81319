"""Runs one attempt at one problem against the server: messages, requests, tool calls between them, a scored `Sample`.

If activations are captured, each request carries the capture parameters and the rollout's key, and the reply carries their
location. The server replies only after the activations are durable, so a sample never refers to missing data. A later turn
captures only its new tokens.

There are two kinds of errors. An error of this problem alone (a prompt longer than the context, a server that repeatedly
fails on it) becomes a sample with `error`, which is retried when the run is resumed. An error that all problems share
(wrong key, unknown model, a layer that does not exist, a lost server) is a `FatalRequestError`: continuing would turn one
mistake into a thousand failed samples.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from openai import AsyncOpenAI
from pydantic import ValidationError

from eval_jobs.chat_request import ModelReply, ProblemFailedError, send_chat_request
from eval_jobs.endpoint import Endpoint, FatalRequestError
from eval_jobs.extractors import judge
from eval_jobs.prompts import Prompt
from eval_jobs.tools import TOOLS, answer
from eval_jobs.variants import Attempt
from eval_jobs.verdicts import Output, Scorer, ScoringFailedError
from roentgen.contract import ActivationReply, ActivationRequest, RolloutKey
from roentgen.runs import RolloutRef, Sample, Turn


@dataclass(frozen=True)
class RolloutPlan:
    """The parameters that all rollouts of a run share; it is sent to every Ray task."""

    endpoint: Endpoint
    """The server."""
    model: str
    """Model name for requests."""
    prompt: Prompt
    """The prompt."""
    sampling: dict[str, Any]
    """Parameters of every request."""
    extractor: str
    """The primary scorer, whose verdict is the sample's."""
    scorers: Mapping[str, Scorer] = field(default_factory=dict)
    """Scorers, by name, in addition to the built-in extractors that suit a problem: the primary one, if it is custom."""
    tools: tuple[str, ...] = ()
    """Names in `TOOLS` that the model may call."""
    max_turns: int = 1
    """Maximum requests per rollout."""
    capture: ActivationRequest | None = None
    """The capture parameters, including the session; None captures nothing."""


@dataclass
class _Conversation:
    """The conversation so far, with its statistics."""

    messages: list[dict[str, Any]]
    turns: list[Turn] = field(default_factory=list)
    rollouts: list[RolloutRef] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, reply: ModelReply) -> None:
        """Append a reply."""
        self.messages.append(reply.message)
        self.finish_reason = reply.finish_reason
        self.turns.append(
            Turn(
                finish_reason=reply.finish_reason,
                prompt_tokens=reply.prompt_tokens,
                cached_tokens=reply.cached_tokens,
                completion_tokens=reply.completion_tokens,
                seconds=reply.seconds,
                tool_calls=len(reply.tool_calls),
            )
        )


async def run_rollout(client: AsyncOpenAI, attempt: Attempt, plan: RolloutPlan) -> Sample:
    """Pose a problem, run the model's tool calls, and score its last message.

    Raises:
        FatalRequestError: if every other problem would fail in the same way.
        ScorerError: if a scorer returns something other than a verdict.
        PromptError: if the prompt cannot pose the problem.
    """
    started = time.monotonic()
    conversation = _Conversation(list(plan.prompt.messages(attempt.problem, attempt.variant.prefix)))
    parameters = _parameters(attempt, plan)
    try:
        for turn in range(plan.max_turns):
            extra = _activations(attempt, plan, turn)
            reply = await send_chat_request(
                client, plan.endpoint, {**parameters, "messages": conversation.messages, "extra_body": extra}
            )
            conversation.add(reply)
            if plan.capture is not None:
                conversation.rollouts.append(_rollout(reply.activations, plan, turn))
            if not (plan.tools and reply.tool_calls):
                break
            conversation.messages += [answer(call) for call in reply.tool_calls]
        else:
            conversation.finish_reason = "max_turns"
        return await _scored_sample(conversation, attempt, plan, time.monotonic() - started)
    except (ProblemFailedError, ScoringFailedError) as error:
        return failed_sample(attempt, plan, str(error), conversation.messages)


def failed_sample(
    attempt: Attempt, plan: RolloutPlan, error: str, messages: list[dict[str, Any]] | None = None
) -> Sample:
    """Return the sample of an attempt that got no answer.

    Args:
        attempt: the attempt.
        plan: the run's parameters.
        error: the reason.
        messages: the conversation; None if nothing was sent.
    """
    said = messages or list(plan.prompt.messages(attempt.problem, attempt.variant.prefix))
    return Sample(**_identity(attempt), messages=said, error=error)


def _identity(attempt: Attempt) -> dict[str, Any]:
    problem = attempt.problem
    return {
        "sample_id": attempt.sample_id,
        "problem_id": problem.problem_id,
        "epoch": attempt.epoch,
        "variant": attempt.variant.name,
        "config_hash": attempt.variant.config_hash,
        "question": problem.question,
        "solution": problem.solution,
        "gold": problem.gold,
        "template": problem.template,
        "fields": dict(problem.fields),
        "finished": time.time(),
    }


def _parameters(attempt: Attempt, plan: RolloutPlan) -> dict[str, Any]:
    """Return the parameters shared by all requests of a rollout."""
    parameters: dict[str, Any] = {"model": plan.model, **plan.sampling}
    parameters["seed"] = plan.sampling["seed"] + attempt.epoch - 1  # a different sample per epoch, reproducible
    if plan.prompt.stop:
        parameters["stop"] = list(plan.prompt.stop)
    if plan.tools:
        parameters["tools"] = [TOOLS[name].definition for name in plan.tools]
    return parameters


def _activations(attempt: Attempt, plan: RolloutPlan, turn: int) -> dict[str, Any] | None:
    """Return the request's `extra_body`: the capture parameters, and the key and labels that join the rollout to this
    sample."""
    if plan.capture is None:
        return None
    problem, variant = attempt.problem, attempt.variant
    key = RolloutKey(
        config_hash=variant.config_hash, problem_id=problem.problem_id, epoch=attempt.epoch, turn=turn
    )  # fmt: skip
    own = {"problem_id": problem.problem_id, "sample_id": attempt.sample_id, "gold": problem.gold}
    labels = {**problem.labels, **own}
    labels |= {"variant": variant.name} if variant.name else {}
    changes = {"key": key, "labels": labels, "since": "turn" if turn else None}
    return {"activations": plan.capture.model_copy(update=changes).model_dump(mode="json", by_alias=True)}


async def _scored_sample(conversation: _Conversation, attempt: Attempt, plan: RolloutPlan, seconds: float) -> Sample:
    response = (
        conversation.messages[-1].get("content") or "" if conversation.messages[-1]["role"] == "assistant" else ""
    )
    # Copies, so that a scorer cannot modify the recorded messages.
    output = Output(response, tuple(map(dict, conversation.messages)), conversation.finish_reason)
    scores = await judge(output, attempt.problem, plan.scorers, plan.endpoint.timeout)
    return Sample(
        **_identity(attempt),
        messages=conversation.messages,
        response=response,
        answers=scores.answers,
        correct_by=scores.correct_by,
        correct=scores.correct_by[plan.extractor],
        values=scores.values,
        finish_reason=conversation.finish_reason,
        prompt_tokens=sum(turn.prompt_tokens for turn in conversation.turns),
        cached_tokens=sum(turn.cached_tokens for turn in conversation.turns),
        completion_tokens=sum(turn.completion_tokens for turn in conversation.turns),
        seconds=seconds,
        turns=conversation.turns,
        rollouts=conversation.rollouts,
    )


def _rollout(found: Any, plan: RolloutPlan, turn: int) -> RolloutRef:
    """Validate the location of the activations.

    Raises:
        FatalRequestError: if the reply has none.
    """
    if found is None:
        raise FatalRequestError(
            f"the server at {plan.endpoint.base_url} returned no activations: is it a Roentgen server?"
        )
    try:
        return RolloutRef(turn=turn, **ActivationReply.model_validate(found).model_dump())
    except ValidationError as error:
        raise FatalRequestError(f"the reply's 'activations' are invalid: {error}") from error
