"""Reports the progress of a run to another shell, from its record alone, whether or not its driver is alive."""

import time
from dataclasses import dataclass

from eval_jobs.progress import Tally, seconds_left
from eval_jobs.summary import expected_samples
from roentgen.runs import Run
from roentgen.runs.failures import Failure, Failures, shorten

RECENT_S = 120.0


@dataclass(frozen=True)
class RunStatus:
    """The progress of a run."""

    running: bool
    """True if an evaluation is recording into it."""
    expected: int
    """Number of samples of the complete run."""
    tally: Tally
    """Tally of the recorded samples."""
    recent: int
    """Samples that finished in the last two minutes."""
    recent_tokens: int
    """Number of their tokens."""
    recent_seconds: float
    """Duration in seconds that these two cover."""
    commonest: Failure | None = None
    """The most common failure; None if there is none."""

    def __str__(self) -> str:
        """Format the status as one line."""
        done = f"{self.tally.scored}/{self.expected} done, {self.tally.correct_so_far}"
        errors = f", {self.tally.errors} errors" if self.tally.errors else ""
        if self.commonest is not None:
            errors += f" (most common, {self.commonest.count}: {shorten(self.commonest.message)})"
        if self.tally.scored == self.expected:
            return f"complete: {done}"
        if not self.running:
            return f"stopped: {done}{errors}; run the same command to continue"
        left = seconds_left(self.recent, self.expected - self.tally.scored, self.recent_seconds)
        speed = f", {self.recent_tokens / self.recent_seconds:.0f} tokens/s" if self.recent else ""
        return f"running: {done}{speed}{left}{errors}"


def status(run: Run, now: float | None = None) -> RunStatus:
    """Return the progress of a run.

    Args:
        run: the run.
        now: current time in seconds since 1970; the clock's if None.

    Raises:
        RunError: if the record is damaged.
    """
    now = time.time() if now is None else now
    tally, failures, recent, tokens, first = Tally(), Failures(), 0, 0, now
    for sample in run.read_samples():
        tally.add(sample)
        if sample.error is not None:
            failures.add(sample.sample_id, sample.error)
        if sample.finished is not None and now - RECENT_S <= sample.finished <= now:
            recent += 1
            tokens += sample.completion_tokens
            first = min(first, sample.finished - sample.seconds)
    seconds = min(RECENT_S, now - first)
    commonest = next(iter(failures.commonest_first()), None)
    return RunStatus(run.is_running, expected_samples(run.config), tally, recent, tokens, max(seconds, 1e-9), commonest)
