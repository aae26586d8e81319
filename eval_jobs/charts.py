"""Charts of the report, as numbers that its template draws."""

from collections.abc import Iterable
from dataclasses import dataclass

from roentgen.runs import Sample

BINS = 24


@dataclass(frozen=True)
class Bar:
    """How many answers have a length.

    Attributes:
        start: fewest tokens.
        stop: most tokens.
        correct: right answers of that length.
        wrong: wrong ones that ended by themselves.
        cut: wrong ones that were cut.
    """

    start: int
    stop: int
    correct: int
    wrong: int
    cut: int

    @property
    def height(self) -> int:
        """All of them."""
        return self.correct + self.wrong + self.cut


def lengths(samples: Iterable[Sample]) -> list[Bar]:
    """Return a histogram of the answers' lengths in tokens; nothing of no answers."""
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
