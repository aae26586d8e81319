"""Has a server answer every problem in every arm, as an OpenAI client, and judges the answers.

All requests of all arms are mixed, so that arms run in the same batches and none has a quieter server than another. An
outcome is appended to a file as it comes. A request that fails for good stops the sweep: an arm without its hardest problems
would be compared with one that has them.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from openai import APIError, AsyncOpenAI
from pydantic import BaseModel, ConfigDict

from probes.steering.arms import Along, Arm
from roentgen.errors import RoentgenError


class SweepError(RoentgenError):
    """A sweep cannot be run; the message says what the server said."""


@dataclass(frozen=True)
class SweepTask:
    """One problem: what is asked."""

    problem_id: str
    messages: list[dict[str, Any]]


PROGRESS_REPORTS = 20
"""How often a sweep says how far it is."""

JudgeAnswer = Callable[[str, str], Awaitable[tuple[bool, bool]]]
"""From a text and the id of its problem to whether an answer could be read, and whether it is right."""


class SweepOutcome(BaseModel):
    """One answer: a line of `outcomes.jsonl`."""

    model_config = ConfigDict(frozen=True)

    problem_id: str
    """Which problem."""
    along: Along
    """The arm."""
    number: int
    """The arm's direction."""
    scale: float
    """The arm's scale."""
    text: str
    """The answer."""
    parsed: bool
    """Whether an answer could be read."""
    correct: bool
    """Whether it is right."""
    tokens: int
    """Generated."""
    finish_reason: str | None
    """Why the model stopped."""
    acted: bool = False
    """Whether the scores of a probe have done something."""


class AnswerPlan(Protocol):
    """How problems are answered, whatever the arms differ in."""

    @property
    def parallel(self) -> int:
        """Requests in flight."""

    @property
    def seed(self) -> int:
        """Of the order in which they are sent."""

    def parameters(self, task: SweepTask, arm: Arm) -> dict[str, Any]:
        """Return a request's parameters but for its messages."""

    def judged_text(self, message: Any) -> str:
        """Return the text of a reply that is judged."""


@dataclass(frozen=True)
class SweepPlan:
    """How problems are answered."""

    model: str
    """The served model."""
    hook_point: str
    """Where vectors are added."""
    layer: int | None
    """In which layer, None for a model-wide hook point."""
    positions: str
    """To which tokens."""
    unit: float
    """The length of what a scale of 1 adds."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """Parameters of every request."""
    parallel: int = 16
    """Requests in flight."""
    seed: int = 0
    """Of the order in which they are sent."""

    def parameters(self, task: SweepTask, arm: Arm) -> dict[str, Any]:
        """Return a request's parameters but for its messages."""
        return {"model": self.model, "extra_body": self.extra_body(arm), **self.sampling}

    def judged_text(self, message: Any) -> str:
        """Return the text of a reply that is judged."""
        return message.content or ""

    def extra_body(self, arm: Arm) -> dict[str, Any]:
        """Return what an arm adds to a request."""
        if arm.direction is None:
            return {}
        steering: dict[str, Any] = {
            "vector": arm.direction.tolist(),
            "hook_point": self.hook_point,
            "scale": arm.scale * self.unit,
            "positions": self.positions,
        }
        return {"steering": [steering | ({} if self.layer is None else {"layer": self.layer})]}


async def run_sweep(
    client: AsyncOpenAI,
    plan: AnswerPlan,
    tasks: Sequence[SweepTask],
    arms: Sequence[Arm],
    judge: JudgeAnswer,
    record: Path,
    on_progress: Callable[[str], None] = lambda text: None,
) -> list[SweepOutcome]:
    """Answer every task in every arm.

    Args:
        client: of a server that steers.
        plan: how.
        tasks: the problems.
        arms: what is compared.
        judge: reads the answers.
        record: a file that outcomes are appended to as they come.
        on_progress: called `PROGRESS_REPORTS` times with a line that says how many outcomes there are.

    Raises:
        SweepError: if a request fails for good.
    """
    pairs = [(task, arm) for task in tasks for arm in arms]
    random.Random(plan.seed).shuffle(pairs)
    free = asyncio.Semaphore(plan.parallel)
    outcomes: list[SweepOutcome] = []

    async def one(task: SweepTask, arm: Arm) -> None:
        async with free:
            outcome = await _answer(client, plan, task, arm, judge)
        outcomes.append(outcome)
        with open(record, "a") as file:
            file.write(outcome.model_dump_json() + "\n")
        if len(outcomes) * PROGRESS_REPORTS // len(pairs) > (len(outcomes) - 1) * PROGRESS_REPORTS // len(pairs):
            on_progress(f"{len(outcomes)} of {len(pairs)} answered")

    try:
        async with asyncio.TaskGroup() as group:
            for task, arm in pairs:
                group.create_task(one(task, arm))
    except* SweepError as errors:
        raise errors.exceptions[0] from None
    return outcomes


async def _answer(client: AsyncOpenAI, plan: AnswerPlan, task: SweepTask, arm: Arm, judge: JudgeAnswer) -> SweepOutcome:
    messages: list[Any] = task.messages
    try:
        reply = await client.chat.completions.create(messages=messages, **plan.parameters(task, arm))
    except APIError as error:
        where = f"{task.problem_id}, along {arm.along} at scale {arm.scale:g}"
        raise SweepError(f"{where}: {error.message}") from error
    choice = reply.choices[0]
    text = plan.judged_text(choice.message)
    parsed, correct = await judge(text, task.problem_id)
    return SweepOutcome(
        problem_id=task.problem_id,
        along=arm.along,
        number=arm.number,
        scale=arm.scale,
        text=text,
        parsed=parsed,
        correct=correct,
        tokens=reply.usage.completion_tokens if reply.usage else 0,
        finish_reason=choice.finish_reason,
        acted=any("acted" in one for one in (choice.model_extra or {}).get("probes") or ()),
    )
