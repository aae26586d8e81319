"""The interface of scorers: what they take and return.

    def score(output: Output, problem: Problem) -> Verdict

A scorer judges one output. A coroutine function does not block other problems while it waits; a plain function runs in the
process's main thread and blocks them. `True` and `False` are short for a `Verdict` on the whole output.

Results of users' functions are validated here, so that errors can name what was wrong.
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
    """A scorer returned something other than a verdict; the message says what. It would do so for every problem, so the run
    stops."""


class ScoringFailedError(RoentgenError):
    """A scorer raised an exception; the message says which and where. This output may be the cause."""


class Output(str):
    """A model's output: the text of its last message, with the conversation and the finish reason."""

    messages: tuple[Mapping[str, Any], ...]
    """The conversation in OpenAI's format, including the model's last message."""
    finish_reason: str | None
    """Why the model stopped: "stop", or "length" if the output was truncated."""

    def __new__(cls, text: str, messages: tuple[Mapping[str, Any], ...] = (), finish_reason: str | None = None) -> Self:
        """Create an output from a text."""
        made = super().__new__(cls, text)
        made.messages, made.finish_reason = messages, finish_reason
        return made


@dataclass(frozen=True)
class Verdict:
    """A scorer's judgment of an output."""

    correct: bool
    """True if the output is correct."""
    answer: str | None = None
    """The extracted answer; None if none was found, which counts as incorrect and is also counted separately."""
    values: Mapping[str, LabelValue] = field(default_factory=dict)
    """Additional values, such as a judge's grade and reason: labels of the sample, which a probe can be trained on."""


Scorer = Callable[[Output, Problem], Verdict | bool | Awaitable[Verdict | bool]]
"""A function that judges an output."""


async def run_scorer(
    name: str, scorer: Scorer, output: Output, problem: Problem, timeout_s: float | None = None
) -> Verdict:
    """Run a scorer on an output.

    Args:
        name: the scorer's name.
        scorer: the scorer.
        output: the output to judge.
        problem: the problem that it answers.
        timeout_s: timeout of a coroutine in seconds; None for no timeout.

    Raises:
        ScorerError: if it returns something other than a verdict.
        ScoringFailedError: if it raises an exception, or takes too long.
    """
    try:
        async with asyncio.timeout(timeout_s) as bound:
            returned = scorer(output, problem)
            if inspect.isawaitable(returned):
                returned = await returned
    except asyncio.CancelledError as error:
        if (task := asyncio.current_task()) is None or task.cancelling():  # this rollout itself is being canceled
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
    """Validate a scorer's result and return it as a verdict with plain values.

    Raises:
        ScorerError: if it is not a verdict.
    """
    where = f"the scorer {name} returned {{}} for {problem.problem_id}"
    import numpy as np  # deferred, because every command imports this module

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
