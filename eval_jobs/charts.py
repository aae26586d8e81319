"""Data of the report's charts, which its template draws."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from roentgen.runs import Sample

BINS = 24
MOST_TICKS = 5


@dataclass(frozen=True)
class Bar:
    """A bar of the histogram of answer lengths."""

    start: int
    """Fewest tokens."""
    stop: int
    """Most tokens."""
    correct: int
    """Correct answers of that length."""
    wrong: int
    """Incorrect answers that ended by themselves."""
    cut: int
    """Incorrect answers that were truncated."""

    @property
    def height(self) -> int:
        """Total."""
        return self.correct + self.wrong + self.cut


def lengths(samples: Iterable[Sample]) -> list[Bar]:
    """Return a histogram of answer lengths in tokens; empty without answers."""
    found = [
        (sample.completion_tokens, sample.correct, sample.finish_reason == "length")
        for sample in samples
        if sample.error is None
    ]
    if not found:
        return []
    width = max(1, -(-(max(tokens for tokens, _, _ in found) + 1) // BINS))
    counts = [[0, 0, 0] for _ in range(max(tokens for tokens, _, _ in found) // width + 1)]
    for tokens, correct, cut in found:
        counts[tokens // width][0 if correct else 2 if cut else 1] += 1
    return [Bar(number * width, (number + 1) * width - 1, *kinds) for number, kinds in enumerate(counts)]


@dataclass(frozen=True)
class Panel:
    """The histogram of one kind of answers on its own scale, so that a rare kind is as visible as a common one."""

    kind: str
    """"correct", "wrong" or "cut"."""
    title: str
    """Display title."""
    counts: list[int]
    """Answers per bar."""

    @property
    def total(self) -> int:
        """Answers of this kind."""
        return sum(self.counts)

    @property
    def highest(self) -> int:
        """Answers in the highest bar."""
        return max(self.counts)


def panels(bars: Sequence[Bar]) -> list[Panel]:
    """Return a histogram for each kind of answers that occurs."""
    every = (
        Panel("correct", "correct", [bar.correct for bar in bars]),
        Panel("wrong", "wrong", [bar.wrong for bar in bars]),
        Panel("cut", "wrong and cut at the token limit", [bar.cut for bar in bars]),
    )
    return [panel for panel in every if panel.total]


def ticks(stop: int) -> list[int]:
    """Return round numbers from 0 to at most `stop`, up to `MOST_TICKS` steps of 1, 2 or 5 times a power of ten."""
    power = 1
    while True:
        for step in (power, 2 * power, 5 * power):
            if stop <= step * MOST_TICKS:
                return list(range(0, stop + 1, step))
        power *= 10
