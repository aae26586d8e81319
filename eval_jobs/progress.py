"""What is shown while an evaluation runs: a live bar on a terminal, plain lines where there is none (a job's log, a pipe)."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from roentgen.runs import Sample

SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Counts samples and shows them; use it as a context, call `add` for each."""

    def __init__(self, console: Console, total: int, recorded: list[Sample]) -> None:
        """Start from what is recorded already; speed is of what is run now."""
        self._console = console
        self._total = total
        self._done = len(recorded)
        self._correct = sum(sample.correct for sample in recorded)
        self._errors = 0
        self._tokens = 0
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
        self._task = self._bar.add_task("evaluating", total=total, completed=self._done, status=self._status())

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def add(self, sample: Sample) -> None:
        """Count a sample that has finished."""
        self._done += 1
        self._correct += sample.correct
        self._errors += sample.error is not None
        self._tokens += sample.completion_tokens
        self._bar.update(self._task, completed=self._done, status=self._status())
        if not self._console.is_terminal:
            self._print_line()

    def _print_line(self) -> None:
        now = time.monotonic()
        if self._done < self._total and now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        self._console.print(f"{self._done}/{self._total} done, {self._status()}", markup=False, highlight=False)

    def _status(self) -> str:
        seconds = time.monotonic() - self._started
        speed = f"{self._tokens / seconds:.0f} tokens/s" if seconds > 0 else ""
        errors = f", {self._errors} errors" if self._errors else ""
        return f"{self._correct} correct, {speed}{errors}"
