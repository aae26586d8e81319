"""Says what a command is doing, and shows that time goes on while it is.

Each stage is a line with the seconds since the start. While one lasts, a terminal shows a clock under it; where there is no
terminal (a job's log, CI), a line every `EVERY_S` seconds says that it is still going on. Nobody should have to wonder whether
a silent command is dead.
"""

import threading
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

EVERY_S = 12.0
"""Seconds between two lines of one stage, where there is no terminal."""

UNHURRIED_S = 1.0
"""How long a stage lasts before its clock is shown."""


class Stages:
    """Call it with each stage; use it as a context, so that the clock ends with the command."""

    def __init__(self, console: Console, every_s: float = EVERY_S) -> None:
        """Begin to count.

        Args:
            console: where to.
            every_s: seconds between two lines of one stage, where there is no terminal.
        """
        self._console = console
        self._every_s = every_s
        self._start = self._since = time.monotonic()
        self._text = ""
        self._live: Live | None = None
        self._over = threading.Event()
        self._talking: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.rest()

    def __call__(self, text: str) -> None:
        """Say what is done from now on."""
        self.rest()
        self._text, self._since = text, time.monotonic()
        self._print(text)
        if self._console.is_terminal:
            # Not for good: the stage's own line stays, the clock under it goes.
            self._live = Live(console=self._console, get_renderable=self._clock, transient=True, refresh_per_second=4)
            self._live.start()
        else:
            self._over = threading.Event()
            self._talking = threading.Thread(target=self._talk, args=(text, self._over), name="stages", daemon=True)
            self._talking.start()

    def rest(self) -> None:
        """Say nothing until the next stage: something else is shown, or nothing is waited for."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._talking is not None:
            self._over.set()
            self._talking.join()
            self._talking = None

    def _print(self, text: str) -> None:
        seconds = Text(f"{time.monotonic() - self._start:6.1f} s ", style="dim")
        self._console.print(seconds.append(text, style="not dim"), highlight=False, soft_wrap=True)

    def _clock(self) -> Text:
        lasts = time.monotonic() - self._since
        return Text(f"         … {lasts:.0f} s" if lasts >= UNHURRIED_S else "", style="dim")

    def _talk(self, text: str, over: threading.Event) -> None:
        while not over.wait(self._every_s):
            self._print(f"still {text}")
