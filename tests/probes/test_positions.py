from typing import Any

import pandas as pd
import pytest

from probes.errors import ProbeDataError
from probes.positions import before_answer, check_positions


def rollout(prompt: str, tokens: list[str]) -> pd.Series:
    """One whose prompt is a token, and whose tokens are given as text."""
    offsets, place = [0], len(prompt)
    for token in tokens:
        offsets.append(place)
        place += len(token)
    return pd.Series(
        {"text": prompt + "".join(tokens), "token_offsets": offsets, "n_prompt": 1, "n_completion": len(tokens)}
    )


@pytest.mark.parametrize(
    ("tokens", "position"),
    [
        (["It", " is", " 1", "8", "."], 2),  # the row of " is" is where " 1" is written next
        (["3", " and", " $1", ",", "200", " dollars"], 2),
        (["42"], 0),  # the prompt's own last row
        (["no", " idea", " at", " all"], 3),  # no number: the last row
        (["12", " or", " 7"], 2),
    ],
)
def test_the_row_before_the_last_number(tokens: Any, position: int) -> None:
    assert before_answer(rollout("what is 99?", tokens)) == position


@pytest.mark.parametrize("name", ["at:1.5", "at:", "at:x", "all", "stride:2", ""])
def test_what_is_no_position_is_refused(name: str) -> None:
    with pytest.raises(ProbeDataError, match="allowed are last_prompt"):
        check_positions(name)
