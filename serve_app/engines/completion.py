"""The state of a growing completion: tokens in; text and the reason of its end out. Both engines use it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from jaxtyping import Float
from torch import Tensor

from roentgen.contract import count_rows
from serve_app.capture.steering import OversteeredError
from serve_app.engines.probe_stopping import Acted, Action
from serve_app.engines.protocol import (
    Finished,
    FinishReason,
    GenerationJob,
    NonFiniteLogitsError,
    TextDelta,
    Timings,
    TokenScore,
)
from serve_app.engines.served_model import ServedModel
from serve_app.engines.text import TextStream


def text_stream(job: GenerationJob, model: ServedModel) -> TextStream:
    """Create the text stream of a job's completion."""
    return TextStream(
        model.tokenizer.backend_tokenizer,
        job.sampling.stop,
        model.markers,
        job.prompt_ids,
        include_stop=job.sampling.include_stop,
    )


@dataclass(kw_only=True)
class CompletionState:
    """A job's completion so far."""

    job: GenerationJob
    """The job."""
    text: TextStream
    """Its text."""
    all_stop_token_ids: frozenset[int]
    """Tokens that end it: the model's end-of-text tokens and the request's stop tokens."""
    token_ids: list[int] = field(default_factory=list)
    """Tokens generated so far."""
    scores: list[TokenScore] = field(default_factory=list)
    """Their scores; empty if the job asks for none."""
    acted: list[Acted] = field(default_factory=list)
    """What the scores of its probes have done."""
    n_emitted: int = 0
    """Number of tokens that have been emitted as deltas."""
    start_time: float = field(default_factory=time.monotonic)
    """When the engine began to read its prompt, on the monotonic clock."""
    first_token_time: float | None = None
    """When it had its first token, on the monotonic clock."""

    @property
    def ended_by(self) -> int | None:
        """The end-of-text or stop token that came last, if one did and it is not part of the text."""
        last = self.token_ids[-1] if self.token_ids else None
        return last if last in self.all_stop_token_ids and not self._is_in_text(last) else None

    @property
    def stop_reason(self) -> int | str | None:
        """The stop string, stop token or probe of the request that ended it; None if something else did."""
        if self.text.stopped_by is not None:
            return self.text.stopped_by
        if self.acted and self.acted[-1].then == "stop":
            return f"probe:{self.job.probes[self.acted[-1].probe].name}"
        last = self.token_ids[-1] if self.token_ids else None
        return last if last in self.all_stop_token_ids and last in self.job.sampling.stop_token_ids else None

    def push(self, token: int, token_score: TokenScore | None) -> FinishReason | None:
        """Add a token, and its score if the job has scores; returns the reason if the generation has ended, else None."""
        self.first_token_time = self.first_token_time or time.monotonic()
        self.token_ids.append(token)
        if token_score is not None:
            self.scores.append(token_score)
        reason = self._ended(token)
        if reason is not None:
            self.text.close()
        return reason

    def act(self, action: Action) -> FinishReason | None:
        """Record an action of a probe's score; returns the reason if the generation has ended, else None.

        To close the reasoning, push the marker token after this call.
        """
        rule = action.rule
        self.acted.append(Acted(rule.probe, rule.when.then, action.position))
        if rule.when.then != "stop":
            return None
        self.text.close()
        return "stop"

    def _ended(self, token: int) -> FinishReason | None:
        sampling = self.job.sampling
        if self.ended_by is not None:
            return "stop"
        self.text.push(token, may_stop=len(self.token_ids) >= sampling.min_tokens)
        if self.text.stopped or token in self.all_stop_token_ids:
            return "stop"
        return "length" if len(self.token_ids) >= sampling.max_tokens else None

    def _is_in_text(self, end: int) -> bool:
        """Whether a token that ends the generation is part of its text."""
        return self.job.sampling.include_stop and end in self.job.sampling.stop_token_ids

    def delta(self, *, final: bool, probed: Callable[[], list[Tensor]] | None = None) -> TextDelta | None:
        """Return the text and tokens since the last call; None if there are none.

        Args:
            final: whether no more tokens follow.
            probed: returns the scores since the last call; called only if there is something to emit.
        """
        text = self.text.take(final=final)
        n_text_tokens = len(self.token_ids) - (self.ended_by is not None)
        if not text and not (final and self.n_emitted < n_text_tokens):
            return None
        start, self.n_emitted = self.n_emitted, n_text_tokens
        return TextDelta(
            text, self.token_ids[start:n_text_tokens], self.scores[start:n_text_tokens], probed() if probed else []
        )

    @property
    def n_rows(self) -> int:
        """Number of its rows: one per token, except the last sampled token."""
        return count_rows(len(self.job.prompt_ids), len(self.token_ids))

    @property
    def n_scored(self) -> int:
        """Number of tokens that its probes have scored.

        These are the tokens with rows, and also the last token if its score ended the completion.
        """
        return self.n_rows + (bool(self.acted) and self.acted[-1].then == "stop")

    def finished(self, reason: FinishReason, probed: Sequence[Float[Tensor, "scored outputs"]] = ()) -> Finished:
        """Return the result, without captured rows.

        Args:
            reason: why it has ended.
            probed: per probe, the scores of `n_scored` tokens.
        """
        submitted, end = self.job.submitted, time.monotonic()
        return Finished(
            text=self.text.text,
            token_ids=self.token_ids,
            scores=self.scores,
            finish_reason=reason,
            captured=None,
            ended_by=self.ended_by,
            stop_reason=self.stop_reason,
            probed=[scores[: self.n_rows] for scores in probed],
            acted=tuple(replace(one, score=float(probed[one.probe][one.position, 0])) for one in self.acted),
            timings=Timings(self.start_time - submitted, (self.first_token_time or end) - submitted, end - submitted),
        )


def no_token(job: GenerationJob) -> Exception | None:
    """Return the error of a job whose logits are NaN; None if that is no error yet.

    A job that captures is checked when it is stored. A job that only reads a prompt needs no logits.
    """
    if job.steering:
        return OversteeredError()
    return NonFiniteLogitsError() if job.capture is None and job.sampling.max_tokens else None
