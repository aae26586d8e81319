"""What a scorer is given and what it returns.

    def score(output: Output, problem: Problem) -> Verdict

A scorer judges one output. It may be a coroutine function, which then does not hold up the other problems while it waits; a
plain function is called in the process's main thread and holds them up. `True` and `False` are short for a `Verdict` of the
whole output.

What a user's function returns is checked here, because nobody else can tell its author what was wrong with it.
"""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from eval_jobs import EvalError
from eval_jobs.records import Problem
from roentgen.contract import Labels, LabelValue
from roentgen.errors import RoentgenError
from roentgen.extensions import format_error, preview

_LABELS: TypeAdapter[dict[str, LabelValue]] = TypeAdapter(Labels)

ALLOWED = "allowed are a Verdict, True and False"


class ScorerError(EvalError):
    """A scorer returns what is no verdict; the message says what. It would do so for every problem, so the run stops."""


class ScoringFailedError(RoentgenError):
    """A scorer raised an exception; the message says which, and where. It may be this output's fault."""


class Output(str):
    """What the model wrote: the text of its last message, and how it came to it."""

    messages: tuple[Mapping[str, Any], ...]
    """The conversation, the model's last message included, as OpenAI spells messages."""
    finish_reason: str | None
    """Why the model stopped: "stop", "length" if it was cut."""

    def __new__(cls, text: str, messages: tuple[Mapping[str, Any], ...] = (), finish_reason: str | None = None) -> Self:
        """Make an output of a text."""
        made = super().__new__(cls, text)
        made.messages, made.finish_reason = messages, finish_reason
        return made


@dataclass(frozen=True)
class Verdict:
    """What a scorer says of an output."""

    correct: bool
    """Whether it is right."""
    answer: str | None = None
    """The answer that was read in it; None if there is none, which counts as not correct and is counted apart."""
    values: Mapping[str, LabelValue] = field(default_factory=dict)
    """What else it found, such as a judge's grade and its reason: labels of the sample, which a probe can be trained on."""


Scorer = Callable[[Output, Problem], Verdict | bool | Awaitable[Verdict | bool]]
"""Judges an output."""


async def run_scorer(
    name: str, scorer: Scorer, output: Output, problem: Problem, timeout_s: float | None = None
) -> Verdict:
    """Have a scorer judge an output.

    Args:
        name: what the scorer is called.
        scorer: the scorer.
        output: what to judge.
        problem: what it answers.
        timeout_s: how long a coroutine may wait; for ever if None.

    Raises:
        ScorerError: if it returns what is no verdict.
        ScoringFailedError: if it raises an exception, or takes too long.
    """
    try:
        async with asyncio.timeout(timeout_s) as bound:
            returned = scorer(output, problem)
            if inspect.isawaitable(returned):
                returned = await returned
    except asyncio.CancelledError as error:
        if (task := asyncio.current_task()) is None or task.cancelling():  # it is this rollout that is cancelled
            raise
        raise ScoringFailedError(f"the scorer {name} raised {format_error(error)}") from error
    except (Exception, SystemExit) as error:
        if bound.expired():
            raise ScoringFailedError(
                f"the scorer {name} gave no verdict within {timeout_s:g} s (--request-timeout)"
            ) from error
        raise ScoringFailedError(f"the scorer {name} raised {format_error(error)}") from error
    return check_verdict(name, returned, output, problem)


def check_verdict(name: str, returned: Any, output: Output, problem: Problem) -> Verdict:
    """Return what a scorer returned, as a verdict with plain values.

    Raises:
        ScorerError: if it is none.
    """
    where = f"the scorer {name} returned {{}} for {problem.problem_id}"
    import numpy as np  # only where something is judged: every command imports this module

    if isinstance(returned, bool | np.bool_):
        return Verdict(bool(returned), str(output))
    if not isinstance(returned, Verdict):
        raise ScorerError(f"{where.format(preview(returned))}; {ALLOWED}")
    if not isinstance(returned.correct, bool | np.bool_):
        raise ScorerError(
            f"{where.format('a Verdict')} with correct={preview(returned.correct)}; allowed are True and False"
        )
    if returned.answer is not None and not isinstance(returned.answer, str):
        raise ScorerError(
            f"{where.format('a Verdict')} with answer={preview(returned.answer)}; allowed are a text and None"
        )
    try:
        values = _LABELS.validate_python(dict(returned.values))
    except (TypeError, ValueError, ValidationError) as error:
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise ScorerError(f"{where.format('a Verdict')} with values={preview(returned.values)}: {why}") from error
    correct = bool(returned.correct)
    answer = str(output) if correct and returned.answer is None else returned.answer
    return Verdict(correct, None if answer is None else str(answer), values)
