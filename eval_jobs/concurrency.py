"""Limits the requests in flight: a fixed number, or with `--parallel auto` as many as raise the server's throughput.

A batching server gains throughput with concurrency until its batch or its compute is full; beyond that, requests only
queue. The adaptive limit doubles, measures tokens per second over a window of requests, and reverts if the throughput rose
by less than 5%. It retries in smaller steps from time to time, because servers change. A busy response (429, 503) lowers
the limit at once.
"""

from dataclasses import dataclass, field
from typing import Protocol

START = 4
MOST = 512
WORTH = 1.05
"""Minimum gain in throughput for which a larger limit is kept."""

BACK_OFF = 0.7
STEP = 1.25
"""Growth factor of the limit, once doubling has failed."""

WINDOW = 16
"""Minimum number of requests per measured window."""

REST = 8
"""Number of windows between a failed increase and the next attempt."""


class ConcurrencyLimit(Protocol):
    """A limit on the requests in flight."""

    @property
    def value(self) -> int:
        """The current limit."""
        ...

    def finished(self, tokens: int, now: float) -> None:
        """Record a finished request, at `now` in seconds of any clock."""
        ...

    def refused(self) -> None:
        """Record a busy response."""
        ...


@dataclass(frozen=True)
class FixedLimit:
    """A fixed limit."""

    value: int

    def finished(self, tokens: int, now: float) -> None:
        """Do nothing."""

    def refused(self) -> None:
        """Do nothing: the client waits and retries."""


@dataclass
class AdaptiveLimit:
    """A limit that grows while the server's throughput grows."""

    value: int = START
    """The current limit."""
    most: int = MOST
    """The maximum limit."""
    _step: float = field(default=2.0, init=False)
    _before: int = field(default=0, init=False)
    _best: float = field(default=0.0, init=False)
    _resting: int = field(default=0, init=False)
    _settling: int = field(default=START, init=False)
    _counted: int = field(default=0, init=False)
    _tokens: int = field(default=0, init=False)
    _started: float = field(default=0.0, init=False)

    def finished(self, tokens: int, now: float) -> None:
        """Count a request, and adjust the limit at the end of a window."""
        if self._settling > 0:  # requests that were in flight when the limit changed do not measure the new limit
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
        """Lower the limit, once for all requests in flight."""
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
