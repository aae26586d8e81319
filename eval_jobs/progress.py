"""What is shown while an evaluation runs: a live bar on a terminal, plain lines where there is none (a job's log, a pipe)."""

import time
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from roentgen.intervals import wilson
from roentgen.runs import Sample

SECONDS_BETWEEN_LINES = 5.0


@dataclass
class Tally:
    """Counts samples."""

    scored: int = 0
    """Those with an answer."""
    correct: int = 0
    """How many are right."""
    errors: int = 0
    """Those without one."""
    tokens: int = 0
    """Generated."""

    def add(self, sample: Sample) -> None:
        """Count a sample."""
        self.scored += sample.error is None
        self.correct += sample.error is None and sample.correct
        self.errors += sample.error is not None
        self.tokens += sample.completion_tokens

    @property
    def correct_so_far(self) -> str:
        """How many are correct, with the interval that this leaves for the accuracy."""
        if not self.scored:
            return "0 correct"
        low, high = wilson(self.correct / self.scored, self.scored)
        share = 100 * self.correct / self.scored
        return f"{self.correct} correct, {share:.1f}% ({100 * low:.1f}–{100 * high:.1f})"


class Progress:
    """Counts samples and shows them; use it as a context, call `add` for each."""

    def __init__(self, console: Console, total: int, recorded: Tally) -> None:
        """Start from what is recorded already; speed is of what is run now."""
        self._console = console
        self._total = total
        self._recorded = recorded.scored
        self._all = replace(recorded, tokens=0)
        self._started = self._last_line = time.monotonic()
        self._bar = RichProgress(
            TextColumn("evaluating"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("evaluating", total=total, completed=self._recorded, status=self._status())

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    @property
    def _done(self) -> int:
        return self._all.scored + self._all.errors

    def add(self, sample: Sample) -> None:
        """Count a sample that has finished."""
        self._all.add(sample)
        self._bar.update(self._task, completed=self._done, status=self._status())
        if not self._console.is_terminal:
            self._print_line()

    def _print_line(self) -> None:
        now = time.monotonic()
        if self._done < self._total and now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        left = seconds_left(self._done - self._recorded, self._total - self._done, now - self._started)
        self._console.print(
            f"{self._done}/{self._total} done, {self._status()}{left}", markup=False, highlight=False, soft_wrap=True
        )

    def _status(self) -> str:
        seconds = time.monotonic() - self._started
        speed = f", {self._all.tokens / seconds:.0f} tokens/s" if seconds > 0 else ""
        errors = f", {self._all.errors} errors" if self._all.errors else ""
        return f"{self._all.correct_so_far}{speed}{errors}"


def seconds_left(done: int, left: int, seconds: float) -> str:
    """Spell how long the rest will take, `, 3:20 left`; nothing if it cannot be told, or nothing is left."""
    return f", {spell_seconds(left * seconds / done)} left" if done and left else ""


def spell_seconds(seconds: float) -> str:
    """Spell a time, `1:02:03` or `3:20`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
