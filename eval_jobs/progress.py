"""Shows the progress of an evaluation: a live bar on a terminal, plain lines elsewhere (a job's log, a pipe)."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import Event, Thread
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from roentgen.intervals import wilson
from roentgen.runs import Sample

SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_BEATS = 1.0
REFRESHES_PER_SECOND = 2
"""Refresh rate of the bar, whose clock shows whole seconds. Rich's default of ten takes 1.4% of a core, which a model on a
CPU lacks."""
SECONDS_OF_SILENCE = 12.0
"""Seconds without output after which a line is printed, if there is no terminal."""


@dataclass
class Tally:
    """A tally of samples."""

    scored: int = 0
    """Samples with an answer."""
    correct: int = 0
    """Correct samples."""
    errors: int = 0
    """Samples without an answer."""
    tokens: int = 0
    """Generated tokens."""

    def add(self, sample: Sample) -> None:
        """Count a sample."""
        self.scored += sample.error is None
        self.correct += sample.error is None and sample.correct
        self.errors += sample.error is not None
        self.tokens += sample.completion_tokens

    @property
    def correct_so_far(self) -> str:
        """Number and share of correct samples, with the 95% interval of the accuracy."""
        if not self.scored:
            return "0 correct"
        low, high = wilson(self.correct / self.scored, self.scored)
        share = 100 * self.correct / self.scored
        return f"{self.correct} correct, {share:.1f}% ({100 * low:.1f}–{100 * high:.1f})"


class Progress:
    """Counts samples and shows progress; use it as a context manager and call `add` for each sample."""

    def __init__(
        self, console: Console, total: int, recorded: Tally, generated: Callable[[], int | None] = lambda: None
    ) -> None:
        """Start from the recorded samples; the speed covers only new ones.

        Args:
            console: the console.
            total: total number of samples.
            recorded: tally of the samples already recorded.
            generated: returns the number of tokens that the server has generated so far; None if unknown.
        """
        self._console = console
        self._generated = generated
        self._doing = "evaluating"
        self._under_way: int | None = None
        self._over = Event()
        self._beat = Thread(target=self._keep_alive, name="progress", daemon=True)
        self._total = total
        self._recorded = recorded.scored
        self._all = replace(recorded, tokens=0)
        self._started = self._last_line = time.monotonic()
        self._bar = RichProgress(
            TextColumn("{task.fields[doing]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
            refresh_per_second=REFRESHES_PER_SECOND,
        )
        fields: dict[str, Any] = {"doing": self._doing, "status": self._status(), "left": ""}
        self._task = self._bar.add_task("evaluating", total=total, completed=self._recorded, **fields)

    def __enter__(self) -> Self:
        self._bar.start()
        self._beat.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._beat.join()
        self._bar.stop()

    def begin(self, doing: str) -> None:
        """Set the current stage; the speed is measured from here."""
        self._doing = doing
        self._started = time.monotonic()
        self._update()
        if not self._console.is_terminal:
            self._say(doing)

    @property
    def _done(self) -> int:
        return self._all.scored + self._all.errors

    def add(self, sample: Sample) -> None:
        """Count a sample that has finished."""
        self._all.add(sample)
        self._update()
        if not self._console.is_terminal:
            self._print_line()

    def _keep_alive(self) -> None:
        """Show the elapsed time and the server's generated tokens until a sample finishes."""
        while not self._over.wait(SECONDS_BETWEEN_BEATS):
            self._under_way = self._generated()
            self._update()
            silent = time.monotonic() - self._last_line
            if not self._console.is_terminal and silent > SECONDS_OF_SILENCE:
                self._say(f"{self._done}/{self._total} done, {self._status()}")

    def _update(self) -> None:
        self._bar.update(
            self._task, completed=self._done, doing=self._doing, status=self._status(), left=self._left().lstrip(", ")
        )

    def _left(self) -> str:
        seconds = time.monotonic() - self._started
        return seconds_left(self._done - self._recorded, self._total - self._done, seconds)

    def _say(self, text: str) -> None:
        self._last_line = time.monotonic()
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _print_line(self) -> None:
        now = time.monotonic()
        if self._done < self._total and now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._say(f"{self._done}/{self._total} done, {self._status()}{self._left()}")

    def _status(self) -> str:
        seconds = time.monotonic() - self._started
        speed = f", {self._all.tokens / seconds:.0f} tokens/s" if seconds > 0 else ""
        if not self._all.tokens:  # no sample has finished: show the server's token count, if known, and the time
            waited = f"{format_seconds(seconds)} so far"
            generated = (
                f"{self._under_way:,} tokens generated, {self._under_way / seconds:.0f} tokens/s, "
                if self._under_way
                else ""
            )
            finished = f"{self._all.errors} failed" if self._all.errors else "no sample finished yet"
            return f"{finished}, {generated}{waited}"
        errors = f", {self._all.errors} errors" if self._all.errors else ""
        return f"{self._all.correct_so_far}{speed}{errors}"


def seconds_left(done: int, left: int, seconds: float) -> str:
    """Format the estimated remaining time, `, 3:20 left`; empty if it is unknown or nothing is left."""
    return f", {format_seconds(left * seconds / done)} left" if done and left else ""


def format_seconds(seconds: float) -> str:
    """Format a duration, `1:02:03` or `3:20`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
