"""The protocol of an engine: jobs in, events out.

A caller submits a `GenerationJob`. The engine calls the job's `on_event` on the engine's own thread: with `TextDelta`s while
the job runs, if it streams, and at the end exactly once with `Finished` or `Failed`. The callback must return quickly, because
nothing generates while it runs. To cancel a job, set its `cancelled` event. The job then leaves the batch at the next step,
and no more events are emitted.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from jaxtyping import Float
from torch import Tensor

from serve_app.capture.late_end import collecting_plan
from serve_app.capture.probe_scores import RequestProbe
from serve_app.capture.rows import CapturedRows, CapturePlan
from serve_app.capture.steering import SteeringVector
from serve_app.engines.probe_stopping import Acted, Stopping
from serve_app.errors import RETRY_AFTER_S, RequestError

FinishReason = Literal["stop", "length"]


class EngineBusyError(RequestError):
    """The queue is full; the client may try again later."""

    status, code, prefix, retry_after_s = 429, "busy", "the server is busy: ", RETRY_AFTER_S


class EngineStoppedError(RequestError):
    """The engine has been closed."""

    status, retry_after_s = 503, RETRY_AFTER_S


class RequestTooLargeError(RequestError):
    """A job needs more memory than the engine has; the message has both numbers."""

    code = "request_too_large"


class UnknownTokenError(RequestError):
    """A prompt has a token that the model has no embedding for; the message names it."""

    param, prefix = "prompt", "prompt: "


class NonFiniteLogitsError(RequestError):
    """The model's logits are NaN, so no token can be chosen; the message says why and what to do."""

    status, code = 500, "non_finite_logits"

    def __init__(self) -> None:
        super().__init__(
            "the model's logits are NaN, so no token can be chosen: its activations overflow in this dtype; run it in bfloat16 "
            "or float32 (dtype)"
        )


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of a job.

    They are applied in this order: biases and penalties on the logits, excluded tokens, temperature, top_k, top_p, min_p.
    """

    max_tokens: int
    """Largest number of tokens to generate; 0 only reads the prompt."""
    min_tokens: int = 0
    """Number of tokens before an end-of-text token, a stop token or a stop string may end the generation."""
    temperature: float = 1.0
    """Temperature; 0 always chooses the most likely token."""
    top_k: int = 0
    """Sample from this many of the most likely tokens; 0 for all."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this probability."""
    min_p: float = 0.0
    """Sample from tokens with at least this share of the most likely token's probability (arXiv 2407.01082); 0 for all."""
    seed: int | None = None
    """Seed of this request's random stream, which depends on nothing else."""
    stop: tuple[str, ...] = ()
    """Stop strings; they are not part of the text."""
    stop_token_ids: frozenset[int] = frozenset()
    """Tokens that end the generation, in addition to the model's end-of-text tokens."""
    ignore_eos: bool = False
    """Whether to ignore the model's end-of-text tokens."""
    include_stop: bool = False
    """Whether the stop string or stop token that ended the generation is part of the text."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that has been generated."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time it has been generated."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or completion (CTRL, arXiv 1909.05858); 1 for
    none."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    allowed_token_ids: tuple[int, ...] | None = None
    """The only allowed tokens; None for all."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences that may not occur in the completion: the last token of one is excluded where the others precede it."""
    top_logprobs: int = 0
    """Number of most likely tokens to report at each position."""
    prompt_logprobs: int | None = None
    """Number of most likely tokens to report at each token of a scored prompt, if more than `top_logprobs`. If it is not None,
    ranks are reported too."""
    logprob_token_ids: tuple[int, ...] = ()
    """Tokens to report at each position, instead of the most likely ones."""

    def all_stop_token_ids(self, eos_token_ids: frozenset[int]) -> frozenset[int]:
        """Return all tokens that end the generation.

        Args:
            eos_token_ids: the model's end-of-text tokens.
        """
        return self.stop_token_ids if self.ignore_eos else eos_token_ids | self.stop_token_ids


class ConstraintError(RequestError):
    """A constraint cannot be compiled or followed; the message says why."""

    code, prefix = "constraint_failed", "response_format or tools: "


class Constraint(Protocol):
    """The allowed next tokens of a generation that follows a grammar; belongs to one job."""

    grammar: str
    """The grammar in llguidance's dialect of Lark."""
    param: str
    """The request's field that it comes from, for errors."""

    def mask(self, logits: Float[Tensor, "vocab"]) -> None:
        """Set the logits of tokens that are not allowed to minus infinity, in place.

        Raises:
            ConstraintError: if no token is allowed.
        """

    def accept(self, token: int) -> None:
        """Continue with a token."""


@dataclass(frozen=True)
class TokenScore:
    """A token's log-probability under the model's own distribution (before penalties, temperature, top_k and top_p)."""

    logprob: float
    """Natural logarithm of its probability."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens at its position, most likely first, each with its log-probability; as many as were asked for."""
    rank: int | None = None
    """Its rank among all tokens, 1 for the most likely; of a prompt's token, only if `Sampling.prompt_logprobs` is set."""


FORCED = TokenScore(math.nan)
"""Score of a forced token: the marker that closes a model's reasoning when a probe's score requires it."""


@dataclass(frozen=True)
class TextDelta:
    """New text of a running job, with its tokens (an end-of-text token is not part of it).

    `probed` has, per probe, the scores of the rows since the last delta: `[rows, outputs]`. A token is processed one step
    after it was sampled, so the scores end one token before the text.
    """

    text: str
    token_ids: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    probed: list[Float[Tensor, "rows outputs"]] = field(default_factory=list)


@dataclass(frozen=True)
class Timings:
    """A job's durations, in seconds since it was submitted."""

    queued: float
    """Until the engine began to read its prompt."""
    first_token: float
    """Until its first token."""
    total: float
    """Until its last token."""


@dataclass(frozen=True)
class Load:
    """An engine's current load and its counters."""

    running: int
    """Jobs in the batch."""
    waiting: int
    """Jobs in the queue."""
    steps: Mapping[int, int] = field(default_factory=dict)
    """Per number of jobs, how many steps have decoded a token for that many jobs together."""
    cache_bytes: int = 0
    """Size of the prefix cache in bytes, captured rows included."""
    cache_hits: int = 0
    """Prompt tokens that were found in the prefix cache."""
    cache_misses: int = 0
    """Prompt tokens that were looked up in it and had to be read."""


SWITCHED_OFF = "it is switched off (prefix_cache: false in the configuration)"


@dataclass(frozen=True)
class PrefixCaching:
    """Whether an engine reuses the common prefix of prompts."""

    enabled: bool
    """Whether it does."""
    reason: str = ""
    """Why it does not, as text."""


@dataclass(frozen=True)
class WorkerRows:
    """A reference to a finished job's rows, which an engine's worker holds until they are stored (`storage.Storage`)."""

    job_id: str
    """The engine's id of the job."""


@dataclass(frozen=True)
class Finished:
    """A job's result."""

    text: str
    """The completion's text, without special tokens and stop strings."""
    token_ids: list[int]
    """Generated tokens, the final one included."""
    scores: list[TokenScore]
    """Scores of these tokens; empty if the job does not ask for them."""
    finish_reason: FinishReason
    """"stop", or "length" if it reached the token limit."""
    captured: CapturedRows | None
    """The captured rows, if they are in this process."""
    worker_rows: WorkerRows | None = None
    """A reference to the captured rows, if a worker holds them."""
    ended_by: int | None = None
    """The token that ended it and is not part of the text; None if something else did."""
    stop_reason: int | str | None = None
    """The stop string, the token of `Sampling.stop_token_ids`, or the probe (`probe:NAME`) that ended it; None if something
    else did."""
    acted: tuple[Acted, ...] = ()
    """Actions that its probe scores have taken, in order."""
    prompt_scores: list[TokenScore] | None = None
    """Scores of the prompt's tokens from the second on, if the job asks for them: `[n_prompt - 1]`."""
    probed: list[Float[Tensor, "rows outputs"]] = field(default_factory=list)
    """Per probe, the scores of all rows: `[n_prompt + max(n_completion - 1, 0), outputs]`."""
    cached_tokens: int = 0
    """Prompt tokens that were found in the prefix cache and not read."""
    timings: Timings = field(default_factory=lambda: Timings(0, 0, 0))
    """Its durations."""

    @property
    def forced(self) -> tuple[int, ...]:
        """Positions of forced tokens, counted from the prompt's first token; their scores are `FORCED`."""
        return tuple(acted.position + 1 for acted in self.acted if acted.then == "close_reasoning")


@dataclass(frozen=True)
class Failed:
    """A job has failed."""

    error: Exception


Event = TextDelta | Finished | Failed


@dataclass(frozen=True, eq=False)
class GenerationJob:
    """One generation; compared by identity."""

    prompt_ids: list[int]
    """The prompt's tokens: at least one, and together with `sampling.max_tokens` within the context."""
    sampling: Sampling
    """How to choose tokens."""
    on_event: Callable[[Event], None]
    """Called with each of its events, on the engine's thread."""
    capture: CapturePlan | None = None
    """Which rows to capture; None for none."""
    stream: bool = False
    """Whether to emit `TextDelta`s."""
    steering: tuple[SteeringVector, ...] = ()
    """Vectors to add to its rows."""
    probes: tuple[RequestProbe, ...] = ()
    """Probes to score its rows with."""
    stopping: Stopping | None = None
    """Actions of these scores; None for none."""
    constraint: Constraint | None = None
    """The grammar to follow; None for free text."""
    score_tokens: bool = True
    """Whether to report the score of each generated token, which requires normalizing the whole vocabulary at every step. A
    job with `stopping` reports it."""
    score_prompt: bool = False
    """Whether to report the scores of the prompt's own tokens."""
    cache_salt: str | None = None
    """Cached tokens are reused only if they were read under the same salt; None shares with all jobs without a salt."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set it to cancel the job."""
    submitted: float = field(default_factory=time.monotonic)
    """Time of creation, on the monotonic clock."""

    @property
    def collecting(self) -> CapturePlan | None:
        """Plan to collect rows with while it runs: if scores may end it, its end is known late."""
        if self.capture is None or self.stopping is None:
            return self.capture
        return collecting_plan(self.capture, len(self.prompt_ids))


class Engine(Protocol):
    """Generates for many jobs concurrently."""

    name: str
    """Its name in the server's configuration."""
    batch_invariant: bool
    """Whether a job's results do not depend on other jobs."""

    @property
    def prefix_cache(self) -> PrefixCaching:
        """Whether prompts are read only from where they differ from earlier ones."""

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
        """Its current load and its counters."""

    @property
    def max_model_len(self) -> int:
        """Largest number of tokens of one sequence."""

    def close(self) -> None:
        """Stop; unfinished jobs fail."""
