"""One job while it runs, and several while their prompts are read: what the engine keeps of each besides its KV cache."""

import time
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from serve_app.capture.rows import RequestRows, UncapturableError
from serve_app.capture.scoring import RequestScores, UnscorableError
from serve_app.engines.protocol import Failed, Finished, GenerationJob, TextDelta, Timings, TokenScore
from serve_app.engines.sampling import Sampler, score
from serve_app.engines.text import TextStream
from serve_app.models import LoadedModel


@dataclass
class Running:
    """A job, and what it has so far: `ends` are the tokens that end it, and `told` tokens have gone to its listener.

    `all_logits` is whether its prompt needs logits at every position. `started` and `spoke` are when its prompt began to be
    read and when it had its first token, on the monotonic clock.
    """

    job: GenerationJob
    sampler: Sampler
    text: TextStream
    rows: RequestRows | None
    probed: RequestScores | None
    ends: frozenset[int]
    all_logits: bool
    token_ids: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    prompt_scores: list[TokenScore] = field(default_factory=list)
    told: int = 0
    started: float = field(default_factory=time.monotonic)
    spoke: float | None = None

    @classmethod
    def start(cls, job: GenerationJob, model: LoadedModel) -> "Running":
        """Begin a job."""
        ends = model.eos_token_ids | job.sampling.stop_token_ids
        tapped = {tap.module for tap in job.capture.taps.values()} if job.capture else set()
        tapped |= {scorer.tap.module for scorer in job.probes}
        return cls(
            job,
            Sampler(job.sampling, job.prompt_ids, ends, job.constraint),
            TextStream(model.tokenizer.backend_tokenizer, job.sampling.stop, model.markers),
            RequestRows(job.capture, len(job.prompt_ids)) if job.capture else None,
            RequestScores(job.probes) if job.probes else None,
            ends,
            all_logits=job.score_prompt or model.head in tapped,
        )

    @property
    def ended_by(self) -> int | None:
        """The end-of-text or stop token that came last, if one did."""
        return self.token_ids[-1] if self.token_ids and self.token_ids[-1] in self.ends else None

    def delta(self, *, final: bool) -> TextDelta | None:
        """Return what has become certain since the last time, None for nothing."""
        text = self.text.take(final=final)
        spoken = len(self.token_ids) - (self.ended_by is not None)
        if not text and not (final and self.told < spoken):
            return None
        start, self.told = self.told, spoken
        probed = self.probed.take() if self.probed else []
        return TextDelta(text, self.token_ids[start:spoken], self.scores[start:spoken], probed)

    def push(self, token: int, token_score: TokenScore) -> str | None:
        """Take a token; returns why the generation has ended, None if it goes on."""
        self.spoke = self.spoke or time.monotonic()
        self.token_ids.append(token)
        self.scores.append(token_score)
        self.sampler.saw(token)
        reason = self._ended(token)
        if reason is not None:
            self.text.close()
        return reason

    def _ended(self, token: int) -> str | None:
        sampling = self.job.sampling
        if self.ended_by is not None:
            return "stop"
        self.text.push(token, may_stop=len(self.token_ids) >= sampling.min_tokens)
        if self.text.stopped:
            return "stop"
        return "length" if len(self.token_ids) >= sampling.max_tokens else None

    def finish(self, reason: str) -> None:
        """Cut a job's rows and report its result; what it should not have asked for fails it alone."""
        try:
            captured = self.rows.cut() if self.rows else None
            probed = self.probed.all() if self.probed else []
        except (UncapturableError, UnscorableError) as error:
            self.job.listener(Failed(error))
            return
        self.job.listener(
            Finished(
                text=self.text.text,
                token_ids=self.token_ids,
                scores=self.scores,
                finish_reason=reason,
                captured=captured,
                ended_by=self.ended_by,
                prompt_scores=self.prompt_scores if self.job.score_prompt else None,
                probed=probed,
                timings=self._timings(),
            )
        )

    def _timings(self) -> Timings:
        start, end = self.job.submitted, time.monotonic()
        return Timings(self.started - start, (self.spoke or end) - start, end - start)


@dataclass
class Prefill:
    """Jobs whose prompts are being read: row i of every tensor is job i, padded on the left; `done` columns are read."""

    running: list[Running]
    tokens: Int[Tensor, "batch width"]
    padding: list[int]
    cache: DynamicCache
    done: int = 0

    @classmethod
    def lay_out(cls, running: list[Running], cache: DynamicCache) -> "Prefill":
        """Put prompts of different lengths into one tensor."""
        width = max(len(one.job.prompt_ids) for one in running)
        padding = [width - len(one.job.prompt_ids) for one in running]
        tokens = torch.zeros(len(running), width, dtype=torch.long)
        for row, one in enumerate(running):
            tokens[row, padding[row] :] = torch.tensor(one.job.prompt_ids)
        return cls(running, tokens, padding, cache)

    @property
    def all_logits(self) -> bool:
        """Whether logits are needed at every position, not only at the last."""
        return any(one.all_logits for one in self.running)

    def score(self, logits: Float[Tensor, "batch piece vocab"]) -> None:
        """Score the prompts' tokens that follow those of the piece just read, for the jobs that want it."""
        for row, one in enumerate(self.running):
            first = max(self.done, self.padding[row])
            following = self.tokens[row, first + 1 : self.done + logits.shape[1] + 1].tolist()
            if one.job.score_prompt and following:
                values = logits[row, first - self.done : first - self.done + len(following)].float()
                one.prompt_scores += score(values, following, [one.job.sampling.top_logprobs] * len(following))
