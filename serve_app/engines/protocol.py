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

    What a request asks for is applied in this order: biases and penalties on the logits, tokens that may not come,
    temperature, top_k, top_p, min_p.
    """

    max_tokens: int
    """The most to generate; 0 only reads the prompt."""
    min_tokens: int = 0
    """The least to generate before an end-of-text token, a stop token or a stop string may end it."""
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_k: int = 0
    """Sample from this many of the most likely tokens, 0 for all."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this much probability."""
    min_p: float = 0.0
    """Sample from tokens with at least this share of the most likely one's probability (arXiv 2407.01082), 0 for all."""
    seed: int | None = None
    """Of this request's random stream, which depends on nothing else."""
    stop: tuple[str, ...] = ()
    """Strings that end the generation; not part of the text."""
    stop_token_ids: frozenset[int] = frozenset()
    """Tokens that end it, beside the model's own end-of-text tokens."""
    ignore_eos: bool = False
    """Whether the model's own end-of-text tokens do not end it."""
    include_stop: bool = False
    """Whether the stop string or the token of `stop_token_ids` that ended it is part of the text."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token generated before."""
    frequency_penalty: float = 0.0
    """Subtracted once for every time a token was generated before."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or completion (CTRL, arXiv 1909.05858), 1 for
    none."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    allowed_token_ids: tuple[int, ...] | None = None
    """The only tokens that may come; None for all."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that may not come in the completion: the last token of one, where the others stand before it."""
    top_logprobs: int = 0
    """How many of the most likely tokens to report at each position."""
    prompt_logprobs: int | None = None
    """How many of the most likely tokens to report beside each token of a scored prompt, if more than `top_logprobs`; not
    None, its rank too."""
    logprob_token_ids: tuple[int, ...] = ()
    """Tokens to report at each position, in place of the most likely ones."""

    def all_stop_token_ids(self, eos_token_ids: frozenset[int]) -> frozenset[int]:
        """Return the tokens that end the generation.

        Args:
            eos_token_ids: the model's own.
        """
        return self.stop_token_ids if self.ignore_eos else eos_token_ids | self.stop_token_ids


class ConstraintError(RequestError):
    """A constraint cannot be built or followed; the message says why."""

    code, prefix = "constraint_failed", "response_format or tools: "


class Constraint(Protocol):
    """What may come next, of a generation that has to follow a grammar; it belongs to one job."""

    grammar: str
    """In llguidance's dialect of Lark."""
    param: str
    """Where the request has it, for errors."""

    def mask(self, logits: Float[Tensor, "vocab"]) -> None:
        """Set the logits of tokens that may not come to minus infinity, in place.

        Raises:
            ConstraintError: if nothing may come.
        """

    def accept(self, token: int) -> None:
        """Go on with a token."""


@dataclass(frozen=True)
class TokenScore:
    """How likely a token was, under the model's own distribution (before penalties, temperature, top_k and top_p)."""

    logprob: float
    """Natural logarithm of its probability."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens at its position, most likely first, each with its logprob; as many as were asked for."""
    rank: int | None = None
    """Its place among all tokens, the most likely one's being 1; of a prompt's token, if `Sampling.prompt_logprobs` is set."""


FORCED = TokenScore(math.nan)
"""Of a token that nobody chose: the marker that closes a model's reasoning where a probe asks for it."""


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
    """How long a job took, in seconds since it was submitted."""

    queued: float
    """Until its prompt began to be read."""
    first_token: float
    """Until its first token."""
    total: float
    """Until its last."""


@dataclass(frozen=True)
class Load:
    """What an engine has to do, and has done."""

    running: int
    """Jobs in the batch."""
    waiting: int
    """Jobs in the queue."""
    steps: Mapping[int, int] = field(default_factory=dict)
    """How many steps have decoded a token for how many jobs together."""
    cache_bytes: int = 0
    """What the prefix cache holds, captured rows included."""
    cache_hits: int = 0
    """Prompt tokens that were found in the prefix cache."""
    cache_misses: int = 0
    """Prompt tokens that were looked for in it and had to be read."""


SWITCHED_OFF = "it is switched off (prefix_cache: false in the configuration)"


@dataclass(frozen=True)
class PrefixCaching:
    """Whether an engine keeps what it has read of a prompt for the next one that begins in the same way."""

    enabled: bool
    """Whether it does."""
    reason: str = ""
    """Why not, for people."""


@dataclass(frozen=True)
class WorkerRows:
    """A finished job's rows that its engine holds where they were captured, until they are stored (`storing.Storage`)."""

    job_id: str
    """The engine's name for the job."""


@dataclass(frozen=True)
class Finished:
    """A job's result."""

    text: str
    """The completion, without special tokens and stop strings."""
    token_ids: list[int]
    """Tokens generated, the final one included."""
    scores: list[TokenScore]
    """Of each of them; empty if the job did not ask for them."""
    finish_reason: FinishReason
    """"stop", or "length" if it was cut."""
    captured: CapturedRows | None
    """The rows asked for, if they are in this process."""
    worker_rows: WorkerRows | None = None
    """Where they are otherwise."""
    ended_by: int | None = None
    """The token that ended it and is no part of the text; None if something else did."""
    stop_reason: int | str | None = None
    """The stop string, the token of `Sampling.stop_token_ids`, or the probe (`probe:NAME`) that ended it; None if something
    else did."""
    acted: tuple[Acted, ...] = ()
    """What the scores of its probes have done, in order."""
    prompt_scores: list[TokenScore] | None = None
    """Of the prompt's tokens from the second on, if the job asked for them: `[n_prompt - 1]`."""
    probed: list[Float[Tensor, "rows outputs"]] = field(default_factory=list)
    """Per probe, the scores of all rows: `[n_prompt + max(n_completion - 1, 0), outputs]`."""
    cached_tokens: int = 0
    """Tokens of the prompt that were found in the prefix cache, and not read."""
    timings: Timings = field(default_factory=lambda: Timings(0, 0, 0))
    """How long it took."""

    @property
    def forced(self) -> tuple[int, ...]:
        """The positions of tokens that nobody chose, counted from the prompt's first; their scores are `FORCED`."""
        return tuple(acted.position + 1 for acted in self.acted if acted.then == "close_reasoning")


@dataclass(frozen=True)
class Failed:
    """A job that could not be finished."""

    error: Exception


Event = TextDelta | Finished | Failed


@dataclass(frozen=True, eq=False)
class GenerationJob:
    """One generation; two are never the same."""

    prompt_ids: list[int]
    """The prompt's tokens; at least one, and with `sampling.max_tokens` within the context."""
    sampling: Sampling
    """How to choose tokens."""
    on_event: Callable[[Event], None]
    """Called with each of its events, on the engine's thread."""
    capture: CapturePlan | None = None
    """What to keep, None for nothing."""
    stream: bool = False
    """Whether to send `TextDelta`s."""
    steering: tuple[SteeringVector, ...] = ()
    """What to add to its rows."""
    probes: tuple[RequestProbe, ...] = ()
    """What to score its rows with."""
    stopping: Stopping | None = None
    """What these scores are to do, None for nothing."""
    constraint: Constraint | None = None
    """The grammar to follow, None for free text."""
    score_tokens: bool = True
    """Whether to report how likely each generated token was, which takes normalizing the whole vocabulary at every step. A job
    with `stopping` does."""
    score_prompt: bool = False
    """Whether to report how likely the prompt's own tokens were."""
    cache_salt: str | None = None
    """What is found in the prefix cache has to have been read under the same salt; None shares with all that have none."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set to leave."""
    submitted: float = field(default_factory=time.monotonic)
    """When it was made, on the monotonic clock."""

    @property
    def collecting(self) -> CapturePlan | None:
        """What to collect while it runs: its end is known late if scores may end it."""
        if self.capture is None or self.stopping is None:
            return self.capture
        return collecting_plan(self.capture, len(self.prompt_ids))


class Engine(Protocol):
    """Generates for many jobs at once."""

    name: str
    """As the server's configuration calls it."""
    batch_invariant: bool
    """Whether what a job gives depends on nothing that runs beside it."""

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
        """What it has to do now."""

    @property
    def max_model_len(self) -> int:
        """The most tokens that one sequence may have."""

    def close(self) -> None:
        """Stop; jobs that have not finished fail."""
