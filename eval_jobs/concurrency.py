"""How many requests are in flight: a fixed number, or with `--parallel auto` as many as make the server faster.

A server that batches gets faster with more in flight until its batch or its compute is full; beyond that, requests only wait.
So the limit climbs: it is doubled, some requests later the rate of tokens is measured, and if it rose by less than a twentieth
the limit goes back to what it was. It tries again now and then, in smaller steps, since servers change. A server that
says that it is busy (429, 503) lowers it at once.
"""

from dataclasses import dataclass, field
from typing import Protocol

START = 4
MOST = 512
WORTH = 1.05
"""How much faster a larger limit must be to be kept."""

BACK_OFF = 0.7
STEP = 1.25
"""By how much the limit grows, once doubling it has been too much."""

WINDOW = 16
"""The fewest requests that a rate is measured over."""

REST = 8
"""How many windows pass, once nothing was gained, before a larger limit is tried again."""


class ConcurrencyLimit(Protocol):
    """How many requests may be in flight."""

    @property
    def value(self) -> int:
        """That many now."""
        ...

    def finished(self, tokens: int, now: float) -> None:
        """Be told that a request has finished, at `now` in seconds of any clock."""
        ...

    def refused(self) -> None:
        """Be told that the server is busy."""
        ...


@dataclass(frozen=True)
class FixedLimit:
    """The same number always."""

    value: int

    def finished(self, tokens: int, now: float) -> None:
        """Change nothing."""

    def refused(self) -> None:
        """Change nothing; the client waits and tries again."""


@dataclass
class AdaptiveLimit:
    """As many as make the server faster."""

    value: int = START
    """Requests in flight now."""
    most: int = MOST
    """Never more than that."""
    _step: float = field(default=2.0, init=False)
    _before: int = field(default=0, init=False)
    _best: float = field(default=0.0, init=False)
    _resting: int = field(default=0, init=False)
    _settling: int = field(default=START, init=False)
    _counted: int = field(default=0, init=False)
    _tokens: int = field(default=0, init=False)
    _started: float = field(default=0.0, init=False)

    def finished(self, tokens: int, now: float) -> None:
        """Count a request; at the end of a window, decide."""
        if self._settling > 0:  # those that were in flight when the limit changed say nothing of the new one
            self._settling -= 1
            self._started = now
            return
        self._counted += 1
        self._tokens += tokens
        if self._counted >= max(WINDOW, 2 * self.value) and now > self._started:
            self._decide(self._tokens / (now - self._started))
            self._counted = self._tokens = 0
            self._started = now

    def refused(self) -> None:
        """Lower the limit, once for all requests that were in flight."""
        if self._settling == 0:
            self._before, self._step, self._resting = 0, STEP, REST
            self._change(max(1, int(self.value * BACK_OFF)))

    def _decide(self, rate: float) -> None:
        if self._resting > 0:
            self._resting -= 1
            self._best = max(self._best, rate) if self._resting < REST - 1 else rate
            if self._resting == 0:
                self._raise()
        elif rate > self._best * WORTH:
            self._best = rate
            self._raise()
        else:
            self._change(self._before or self.value)
            self._before, self._step, self._resting = 0, STEP, REST

    def _raise(self) -> None:
        self._before = self.value
        self._change(min(self.most, max(self.value + 1, int(self.value * self._step))))

    def _change(self, value: int) -> None:
        self._settling = value if value != self.value else 0
        self._counted = self._tokens = 0
        self.value = value
