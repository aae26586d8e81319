"""Runs a sweep: a server answers every problem in every arm, and the answers are judged.

The requests of all arms are interleaved, so that arms run in the same batches under the same load. Each outcome is appended
to a file as it arrives. A request that fails permanently stops the sweep: otherwise an arm without its hardest problems
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
    """A sweep cannot be run; the message has the server's error."""


@dataclass(frozen=True)
class SweepTask:
    """A problem of a sweep."""

    problem_id: str
    messages: list[dict[str, Any]]


PROGRESS_REPORTS = 20
"""Number of progress reports per sweep."""

JudgeAnswer = Callable[[str, str], Awaitable[tuple[bool, bool]]]
"""Maps a text and its problem's id to whether an answer was extracted, and whether it is correct."""


class SweepOutcome(BaseModel):
    """An answer: a line of `outcomes.jsonl`."""

    model_config = ConfigDict(frozen=True)

    problem_id: str
    """The problem's id."""
    along: Along
    """The arm."""
    number: int
    """The arm's direction."""
    scale: float
    """The arm's scale."""
    text: str
    """The answer."""
    parsed: bool
    """True if an answer was extracted."""
    correct: bool
    """True if it is correct."""
    tokens: int
    """Generated."""
    finish_reason: str | None
    """Why the model stopped."""
    acted: bool = False
    """True if a probe's scores have acted on the generation."""


class AnswerPlan(Protocol):
    """How problems are answered, independent of the kind of arms."""

    @property
    def parallel(self) -> int:
        """Requests in flight."""

    @property
    def seed(self) -> int:
        """Seed of the order of the requests."""

    def parameters(self, task: SweepTask, arm: Arm) -> dict[str, Any]:
        """Return a request's parameters, except its messages."""

    def judged_text(self, message: Any) -> str:
        """Return the text of a reply to be judged."""


@dataclass(frozen=True)
class SweepPlan:
    """How problems are answered in a steering sweep."""

    model: str
    """The served model."""
    hook_point: str
    """The hook point where vectors are added."""
    layer: int | None
    """The layer; None for a model-wide hook point."""
    positions: str
    """To which tokens."""
    unit: float
    """Length of the vector added at scale 1."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """Parameters of every request."""
    parallel: int = 16
    """Requests in flight."""
    seed: int = 0
    """Seed of the order of the requests."""

    def parameters(self, task: SweepTask, arm: Arm) -> dict[str, Any]:
        """Return a request's parameters, except its messages."""
        return {"model": self.model, "extra_body": self.extra_body(arm), **self.sampling}

    def judged_text(self, message: Any) -> str:
        """Return the text of a reply to be judged."""
        return message.content or ""

    def extra_body(self, arm: Arm) -> dict[str, Any]:
        """Return an arm's additions to a request."""
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
        client: client of a server that supports steering.
        plan: how problems are answered.
        tasks: the problems.
        arms: the conditions.
        judge: judges the answers.
        record: the file to which outcomes are appended.
        on_progress: called `PROGRESS_REPORTS` times with a line about the number of outcomes.

    Raises:
        SweepError: if a request fails permanently.
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
