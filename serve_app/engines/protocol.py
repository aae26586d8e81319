"""What an engine takes and gives.

A caller submits a `GenerationJob`; the engine calls the job's listener, on the engine's own thread, with `TextDelta`s while
it runs (if it streams) and at the end exactly once with `Finished` or `Failed`. The listener must be quick: while it runs,
nothing generates. A job is cancelled by setting its `cancelled` event; it then leaves the batch at the next step and its
listener hears nothing more.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from jaxtyping import Float
from torch import Tensor

from serve_app.capture.rows import CapturedRows, CapturePlan
from serve_app.capture.scoring import Scorer
from serve_app.capture.steering import Addition
from serve_app.errors import RETRY_AFTER_S, RequestError

FinishReason = Literal["stop", "length"]


class EngineBusyError(RequestError):
    """The queue is full; try again later."""

    status, code, prefix, retry_after_s = 429, "busy", "the server is busy: ", RETRY_AFTER_S


class EngineStoppedError(RequestError):
    """The engine has been closed."""

    status, retry_after_s = 503, RETRY_AFTER_S


class RequestTooLargeError(RequestError):
    """A job needs more of the KV cache than the engine has; the message says both numbers."""

    code = "request_too_large"


class UnknownTokenError(RequestError):
    """A job's prompt has a token that the model has no embedding for; the message names it."""

    param, prefix = "prompt", "prompt: "


class NonFiniteLogitsError(RequestError):
    """The model gives no probabilities, so there is no token to choose; the message says why and what to do."""

    status, code = 500, "non_finite_logits"

    def __init__(self) -> None:
        super().__init__(
            "the model's logits are NaN, so no token can be chosen: its activations overflow in this dtype; run it in bfloat16 "
            "or float32 (dtype)"
        )


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens.

    What a request asks for is applied in this order: biases and penalties on the logits, tokens that may not come yet,
    temperature, top_k, top_p.

    Attributes:
        max_tokens: the most to generate; 0 only reads the prompt.
        min_tokens: the least to generate before an end-of-text token, a stop token or a stop string may end it.
        temperature: 0 takes the most likely token.
        top_k: sample from this many of the most likely tokens, 0 for all.
        top_p: sample from the smallest set of tokens with this much probability.
        seed: of this request's random stream, which depends on nothing else.
        stop: strings that end the generation; not part of the text.
        stop_token_ids: tokens that end it, beside the model's own end-of-text tokens.
        presence_penalty: subtracted from the logit of every token generated before.
        frequency_penalty: subtracted once for every time a token was generated before.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or completion (CTRL, arXiv
            1909.05858), 1 for none.
        logit_bias: added to the logits of these tokens.
        top_logprobs: how many of the most likely tokens to report at each position.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int = 0


class ConstraintError(RequestError):
    """A constraint cannot be built or followed; the message says why."""

    code, prefix = "constraint_failed", "response_format or tools: "


class Constraint(Protocol):
    """What may come next, of a generation that has to follow a grammar; it belongs to one job.

    Attributes:
        grammar: in llguidance's dialect of Lark.
        param: where the request has it, for errors.
    """

    grammar: str
    param: str

    def mask(self, logits: Float[Tensor, "vocab"]) -> None:
        """Set the logits of tokens that may not come to minus infinity, in place.

        Raises:
            ConstraintError: if nothing may come.
        """

    def accept(self, token: int) -> None:
        """Go on with a token."""


@dataclass(frozen=True)
class TokenScore:
    """How likely a token was, under the model's own distribution (before penalties, temperature, top_k and top_p).

    Attributes:
        logprob: natural logarithm of its probability.
        top: the most likely tokens at its position, most likely first, each with its logprob; as many as were asked for.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TextDelta:
    """New text of a running job, and the tokens that have come with it (an end-of-text token is no part of it).

    `probed` is, per probe, the scores of the rows read since the last time: `[rows, outputs]`. A token is read a step after
    it was sampled, so they end one token earlier than the text.
    """

    text: str
    token_ids: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    probed: list[Float[Tensor, "rows outputs"]] = field(default_factory=list)


@dataclass(frozen=True)
class Timings:
    """How long a job took, in seconds since it was submitted.

    Attributes:
        queued: until its prompt began to be read.
        first_token: until its first token.
        total: until its last.
    """

    queued: float
    first_token: float
    total: float


@dataclass(frozen=True)
class Load:
    """What an engine has to do, and has done.

    Attributes:
        running: jobs in the batch.
        waiting: jobs in the queue.
        steps: how many steps have decoded a token for how many jobs together.
    """

    running: int
    waiting: int
    steps: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class HeldRows:
    """A finished job's rows that its engine holds where they were captured, until they are stored (`storing.Storage`).

    Attributes:
        job_id: the engine's name for the job.
    """

    job_id: str


@dataclass(frozen=True)
class Finished:
    """A job's result.

    Attributes:
        text: the completion, without special tokens and stop strings.
        token_ids: tokens generated, the final one included.
        scores: of each of them.
        finish_reason: "stop", or "length" if it was cut.
        ended_by: the token that ended it, which is no part of the text; None if something else did.
        captured: the rows asked for, if they are in this process.
        held: where they are otherwise.
        prompt_scores: of the prompt's tokens from the second on, if the job asked for them: `[n_prompt - 1]`.
        probed: per probe, the scores of all rows: `[n_prompt + max(n_completion - 1, 0), outputs]`.
        timings: how long it took.
    """

    text: str
    token_ids: list[int]
    scores: list[TokenScore]
    finish_reason: FinishReason
    captured: CapturedRows | None
    held: HeldRows | None = None
    ended_by: int | None = None
    prompt_scores: list[TokenScore] | None = None
    probed: list[Float[Tensor, "rows outputs"]] = field(default_factory=list)
    timings: Timings = field(default_factory=lambda: Timings(0, 0, 0))


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
        steering: what to add to its rows.
        probes: what to score its rows with.
        stream: whether to send `TextDelta`s.
        constraint: the grammar to follow, None for free text.
        score_prompt: whether to report how likely the prompt's own tokens were.
        cancelled: set to leave.
        submitted: when it was made, on the monotonic clock.
    """

    prompt_ids: list[int]
    sampling: Sampling
    listener: Callable[[Event], None]
    capture: CapturePlan | None = None
    stream: bool = False
    steering: tuple[Addition, ...] = ()
    probes: tuple[Scorer, ...] = ()
    constraint: Constraint | None = None
    score_prompt: bool = False
    cancelled: threading.Event = field(default_factory=threading.Event)
    submitted: float = field(default_factory=time.monotonic)


class Engine(Protocol):
    """Generates for many jobs at once.

    Attributes:
        name: as the server's configuration calls it.
        scores_rows: whether jobs may have probes.
        batch_invariant: whether what a job gives depends on nothing that runs beside it.
    """

    name: str
    scores_rows: bool
    batch_invariant: bool

    def submit(self, job: GenerationJob) -> None:
        """Queue a job.

        Raises:
            RequestTooLargeError: if it can never fit.
            UnknownTokenError: if the model has no embedding for one of its tokens.
            EngineBusyError: if the queue is full.
            EngineStoppedError: if the engine is closed.
        """

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""

    @property
    def load(self) -> Load:
        """What it has to do now."""

    @property
    def capacity(self) -> int:
        """The most tokens that one sequence may have."""

    def close(self) -> None:
        """Stop; jobs that have not finished fail."""
