"""Shows the current stage of a command and its duration.

Each stage is printed as a line with the seconds since the start. During a stage, a terminal shows a clock below it. Without a
terminal (in a job's log, in CI), a line is printed every `EVERY_S` seconds, so that a silent command does not look dead.
"""

import threading
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

EVERY_S = 12.0
"""Seconds between two lines of one stage without a terminal."""

UNHURRIED_S = 1.0
"""Seconds before a stage's clock is shown."""


class Stages:
    """Displays stages: call it with each stage, within a "with" block that ends the clock."""

    def __init__(self, console: Console, every_s: float = EVERY_S) -> None:
        """Start the clock.

        Args:
            console: the console to print to.
            every_s: seconds between two lines of one stage without a terminal.
        """
        self._console = console
        self._every_s = every_s
        self._start = self._since = time.monotonic()
        self._text = ""
        self._live: Live | None = None
        self._over = threading.Event()
        self._repeater: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.rest()

    def __call__(self, text: str) -> None:
        """Start a stage."""
        self.rest()
        self._text, self._since = text, time.monotonic()
        self._print(text)
        if self._console.is_terminal:
            # The clock is transient; the stage's own line stays.
            self._live = Live(console=self._console, get_renderable=self._clock, transient=True, refresh_per_second=4)
            self._live.start()
        else:
            self._over = threading.Event()
            self._repeater = threading.Thread(target=self._repeat, args=(text, self._over), name="stages", daemon=True)
            self._repeater.start()

    def rest(self) -> None:
        """Stop the clock until the next stage, to show something else."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._repeater is not None:
            self._over.set()
            self._repeater.join()
            self._repeater = None

    def _print(self, text: str) -> None:
        seconds = Text(f"{time.monotonic() - self._start:6.1f} s ", style="dim")
        self._console.print(seconds.append(text, style="not dim"), highlight=False, soft_wrap=True)

    def _clock(self) -> Text:
        lasts = time.monotonic() - self._since
        return Text(f"         … {lasts:.0f} s" if lasts >= UNHURRIED_S else "", style="dim")

    def _repeat(self, text: str, over: threading.Event) -> None:
        while not over.wait(self._every_s):
            self._print(f"still {text}")
