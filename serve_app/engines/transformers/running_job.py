"""The state of one running job, and of several whose prompts are being read."""

import logging
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache

from serve_app.capture.late_end import finalize_rows
from serve_app.capture.probe_scores import RequestScores, UnscorableError
from serve_app.capture.row_memory import RowMemory
from serve_app.capture.rows import RequestRows, UncapturableError
from serve_app.engines.completion import CompletionState, text_stream
from serve_app.engines.probe_stopping import Action, StopWatch
from serve_app.engines.protocol import FORCED, Failed, FinishReason, GenerationJob, TextDelta, TokenScore
from serve_app.engines.transformers.loaded_model import LoadedModel
from serve_app.engines.transformers.sampling import Sampler, score_prompt

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class RunningJob(CompletionState):
    """A running job's state in this engine."""

    sampler: Sampler
    """Chooses its tokens."""
    rows: RequestRows | None
    """Its captured rows."""
    probed: RequestScores | None
    """The scores of its probes."""
    all_logits: bool
    """Whether its prompt needs logits at every position."""
    prompt_scores: list[TokenScore] = field(default_factory=list)
    """Scores of its prompt's tokens, if it asks for them."""
    cached: int = 0
    """Tokens of its prompt that were found in the prefix cache and not read."""
    filler: RequestRows | None = None
    """Keeps rows of its prompt for the prefix cache, while the prompt is read."""
    watch: StopWatch | None = None
    """Checks its probe scores, if they may stop it."""

    @classmethod
    def start(cls, job: GenerationJob, model: LoadedModel, memory: RowMemory) -> "RunningJob":
        """Create a job's state; its rows are allocated from `memory`."""
        sampling, stop_token_ids, collecting = (
            job.sampling,
            job.sampling.all_stop_token_ids(model.eos_token_ids),
            job.collecting,
        )
        tapped = {tap.module for tap in job.capture.taps.values()} if job.capture else set()
        tapped |= {scorer.tap.module for scorer in job.probes}
        return cls(
            job=job,
            text=text_stream(job, model),
            all_stop_token_ids=stop_token_ids,
            sampler=Sampler(sampling, job.prompt_ids, stop_token_ids, job.constraint),
            rows=RequestRows(collecting, len(job.prompt_ids), memory) if collecting else None,
            probed=RequestScores(job.probes) if job.probes else None,
            all_logits=job.score_prompt or model.head in tapped,
            watch=StopWatch(job.stopping, job.prompt_ids) if job.stopping else None,
        )

    def advance(self, token: int, token_score: TokenScore | None) -> FinishReason | None:
        """Add a sampled token, and its score if the job has scores; returns the reason if the job has ended, else None."""
        self.sampler.accept(token)
        return self.push(token, token_score)

    def stop_action(self) -> Action | None:
        """Return the action that the latest probe scores require before the next token is chosen; None for none.

        Raises:
            UnscorableError: if there are no scores.
        """
        if self.watch is None or self.probed is None:
            return None
        start, stop = self.watch.next, self.probed.n_scored
        if stop <= start:
            return None  # only the prompt has been read
        n_prompt = len(self.job.prompt_ids)
        return self.watch.see(self.token_ids[start - n_prompt : stop - n_prompt], self.probed.last(stop - start))

    def apply_stop(self, action: Action) -> FinishReason | None:
        """Carry out an action in place of a sampled token; returns the reason if the generation has ended, else None."""
        reason = self.act(action)
        if reason is not None:
            return reason
        stopping = self.job.stopping
        assert stopping is not None
        assert stopping.reasoning is not None
        return self.advance(stopping.reasoning.end, FORCED)

    def next_delta(self, *, final: bool) -> TextDelta | None:
        """Return the text and tokens since the last delta; None if there are none."""
        return self.delta(final=final, probed=partial(self.probed.take, self.n_rows) if self.probed else None)

    def finish(self, reason: FinishReason) -> None:
        """Finalize a job's rows and emit its result; if its rows or scores cannot be had, only this job fails."""
        try:
            captured = self.rows.cut() if self.rows else None
            probed = self.probed.all() if self.probed else []
        except (UncapturableError, UnscorableError) as error:
            self.fail(error)
            return
        if captured is not None and self.job.stopping is not None and self.job.capture is not None:
            captured = finalize_rows(captured, self.job.capture, len(self.job.prompt_ids), self.n_rows)
        prompt_scores = self.prompt_scores if self.job.score_prompt else None
        self.job.on_event(
            replace(
                self.finished(reason, probed),
                captured=captured,
                prompt_scores=prompt_scores,
                cached_tokens=self.cached,
            )
        )

    def restart(self, memory: RowMemory) -> None:
        """Drop all rows and scores: its forwards run again, over the tokens that it has by now."""
        self.cached, self.filler = 0, None
        if self.rows is not None:
            self.rows = RequestRows(self.rows.plan, len(self.job.prompt_ids), memory)
        if self.probed is not None:
            self.probed.restart()
        if not self.token_ids:
            self.prompt_scores = []

    def fail(self, error: Exception) -> None:
        """Emit the job's failure; it leaves the batch like a cancelled job."""
        self.job.cancelled.set()
        try:
            self.job.on_event(Failed(error))
        except Exception:  # the caller is gone; the other jobs of the batch are not
            log.exception("a failure could not be emitted: %s", error)

    @property
    def processed_ids(self) -> list[int]:
        """The tokens that the model has processed once the prompt is read: all but the one sampled last."""
        return self.job.prompt_ids + self.token_ids[:-1]


@dataclass
class Prefill:
    """Jobs whose tokens are being read.

    Row i of every tensor is job i, padded on the left. The first `done` columns have been read. `cache` is None until the
    model has created one, if it creates its own.
    """

    running: list[RunningJob]
    tokens: Int[Tensor, "batch width"]
    padding: list[int]
    cache: Any
    done: int = 0

    @classmethod
    def lay_out(cls, running: list[RunningJob], cache: Cache | None, *, processed_only: bool = False) -> "Prefill":
        """Put the tokens of several jobs into one padded tensor.

        Args:
            running: the jobs.
            cache: the cache to read them with.
            processed_only: leave out each job's last sampled token, which the model has not processed.
        """
        sequences = [one.processed_ids if processed_only else one.job.prompt_ids + one.token_ids for one in running]
        width = max(map(len, sequences))
        padding = [width - len(sequence) for sequence in sequences]
        tokens = torch.zeros(len(running), width, dtype=torch.long)
        for row, sequence in enumerate(sequences):
            tokens[row, padding[row] :] = torch.tensor(sequence)
        return cls(running, tokens, padding, cache)

    @property
    def width(self) -> int:
        """Number of columns to read."""
        return self.tokens.shape[1]

    def inputs(self, stop: int) -> tuple[Int[Tensor, "batch context"], Int[Tensor, "batch piece"]]:
        """Return the attention mask up to a column, and the position ids of the columns from `done` up to it."""
        padding, columns = torch.tensor(self.padding)[:, None], torch.arange(stop)
        return (columns >= padding).long(), (columns - padding).clamp(min=0)[:, self.done :]

    @property
    def all_logits(self) -> bool:
        """Whether logits are needed at every position, not only at the last."""
        return any(one.all_logits for one in self.running)

    def score(self, logits: Float[Tensor, "batch piece vocab"]) -> None:
        """Score the prompt tokens that follow those of the piece just read, for the jobs that ask for it."""
        for row, one in enumerate(self.running):
            first = max(self.done, self.padding[row])
            following = self.tokens[row, first + 1 : self.done + logits.shape[1] + 1].tolist()
            if one.job.score_prompt and following and not one.token_ids:
                values = logits[row, first - self.done : first - self.done + len(following)].float()
                one.prompt_scores += score_prompt(values, following, one.job.sampling)
