"""The histogram of lengths, counted by hand."""

from eval_jobs.charts import BINS, lengths
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
