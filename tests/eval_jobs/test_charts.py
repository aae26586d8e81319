"""The histogram of lengths, counted by hand."""

import pytest

from eval_jobs.charts import BINS, MOST_TICKS, lengths, panels, ticks
from roentgen.runs import Sample


def sample(tokens: int, correct: bool = False, finish_reason: str = "stop", error: str | None = None) -> Sample:
    return Sample(
        sample_id="s", problem_id="p", config_hash="h", question="q", solution="s", gold="1", correct=correct,
        completion_tokens=tokens, finish_reason=finish_reason, error=error,
    )  # fmt: skip


def test_every_answer_is_in_one_bar() -> None:
    found = [
        sample(0, correct=True),
        sample(3),
        sample(3, finish_reason="length"),
        sample(4, correct=True),
        sample(9, error="no"),
    ]
    bars = lengths(found)
    assert [(bar.start, bar.stop, bar.correct, bar.wrong, bar.cut) for bar in bars] == [
        (0, 0, 1, 0, 0), (1, 1, 0, 0, 0), (2, 2, 0, 0, 0), (3, 3, 0, 1, 1), (4, 4, 1, 0, 0),
    ]  # fmt: skip


def test_long_answers_share_bars() -> None:
    bars = lengths([sample(tokens) for tokens in range(1000)])
    assert len(bars) <= BINS
    assert sum(bar.height for bar in bars) == 1000
    assert bars[0].height == bars[0].stop + 1
    assert lengths([]) == []


def test_each_kind_of_answers_has_a_scale_of_its_own() -> None:
    found = [sample(3) for _ in range(500)] + [sample(3, correct=True), sample(9, correct=True)]
    correct, wrong = panels(lengths(found))
    assert (correct.kind, correct.counts[3], correct.highest, correct.total) == ("correct", 1, 1, 2)
    assert (wrong.kind, wrong.counts[3], wrong.highest, wrong.total) == ("wrong", 500, 500, 500)
    assert panels([]) == []


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (1, [0, 1]),
        (7, [0, 2, 4, 6]),
        (66, [0, 20, 40, 60]),
        (100, [0, 20, 40, 60, 80, 100]),
        (2049, [0, 500, 1000, 1500, 2000]),
    ],
)
def test_ticks_are_round(stop: int, expected: list[int]) -> None:
    assert ticks(stop) == expected
    assert len(ticks(stop)) <= MOST_TICKS + 1
