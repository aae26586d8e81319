"""What an engine takes and gives.

A caller submits a `GenerationJob`; the engine calls the job's listener, on the engine's own thread, with `TextDelta`s while
it runs (if it streams) and at the end exactly once with `Finished` or `Failed`. The listener must be quick: while it runs,
nothing generates. A job is cancelled by setting its `cancelled` event; it then leaves the batch at the next step and its
listener hears nothing more.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from serve_app.capture.rows import CapturedRows, CapturePlan


class EngineBusyError(Exception):
    """The queue is full; try again later."""


class EngineStoppedError(Exception):
    """The engine has been closed."""


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens.

    Attributes:
        max_tokens: the most to generate.
        temperature: 0 takes the most likely token.
        top_p: sample from the smallest set of tokens with this much probability.
        seed: of this request's random stream, which depends on nothing else.
        stop: strings that end the generation; not part of the text.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class TextDelta:
    """New text of a running job."""

    text: str


@dataclass(frozen=True)
class Finished:
    """A job's result.

    Attributes:
        text: the completion, without special tokens and stop strings.
        token_ids: tokens generated, the final one included.
        logprobs: log-probability of each under the model's own distribution (before temperature and top_p).
        finish_reason: "stop", or "length" if it was cut.
        captured: the rows asked for, None if none were.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    captured: CapturedRows | None


@dataclass(frozen=True)
class Failed:
    """A job that could not be finished."""

    error: Exception


Event = TextDelta | Finished | Failed


@dataclass(frozen=True)
class GenerationJob:
    """One generation.

    Attributes:
        prompt_ids: the prompt's tokens; at least one, and with `sampling.max_tokens` within the context.
        sampling: how to choose tokens.
        listener: hears what happens.
        capture: what to keep, None for nothing.
        stream: whether to send `TextDelta`s.
        cancelled: set to leave.
    """

    prompt_ids: list[int]
    sampling: Sampling
    listener: Callable[[Event], None]
    capture: CapturePlan | None = None
    stream: bool = False
    cancelled: threading.Event = field(default_factory=threading.Event)


class Engine(Protocol):
    """Generates for many jobs at once."""

    def submit(self, job: GenerationJob) -> None:
        """Queue a job.

        Raises:
            EngineBusyError: if the queue is full.
            EngineStoppedError: if the engine is closed.
        """

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""

    def close(self) -> None:
        """Stop; jobs that have not finished fail."""
