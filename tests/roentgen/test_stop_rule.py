"""The stop rule against its definition, with the scores split into pieces in any way."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from roentgen.stop_rule import ReasoningTokens, StopWhen, find_stop

SCORED = st.lists(st.tuples(st.floats(-2, 2, width=32), st.booleans()), max_size=30)
LENGTHS = st.integers(1, 5)
MARKS = ReasoningTokens(start=1, end=2)


def split(tokens: list[tuple[float, bool]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([score for score, _ in tokens], dtype=np.float32), np.array([c for _, c in tokens], dtype=bool)


@given(SCORED, st.floats(-2, 2, width=32), LENGTHS, st.integers(0, 10))
def test_the_first_token_that_ends_a_row_of_scores_is_found(
    tokens: list[tuple[float, bool]], above: float, length: int, first: int
) -> None:
    scores, counted = split(tokens)
    ends = [
        place
        for place in range(first, len(tokens))
        if place + 1 >= length and all(c and s > above for s, c in tokens[place + 1 - length : place + 1])
    ]
    assert find_stop(scores, counted, above, length, first=first)[0] == (ends[0] if ends else None)


@given(SCORED, st.floats(-2, 2, width=32), LENGTHS, st.data())
def test_pieces_find_what_the_whole_does(
    tokens: list[tuple[float, bool]], above: float, length: int, data: st.DataObject
) -> None:
    """An engine sees one token at a time, or several where a forward is repeated; a sweep sees all."""
    scores, counted = split(tokens)
    run, start, found = 0, 0, None
    while start < len(tokens) and found is None:
        stop = data.draw(st.integers(start + 1, len(tokens)))
        place, run = find_stop(scores[start:stop], counted[start:stop], above, length, run)
        found = None if place is None else start + place
        start = stop
    assert found == find_stop(scores, counted, above, length)[0]


@given(SCORED, st.floats(-2, 2, width=32), LENGTHS)
def test_a_higher_score_or_a_longer_row_never_ends_it_earlier(
    tokens: list[tuple[float, bool]], above: float, length: int
) -> None:
    scores, counted = split(tokens)

    def place(above: float, length: int) -> float:
        found, _ = find_stop(scores, counted, above, length)
        return np.inf if found is None else found

    assert place(above + 0.5, length) >= place(above, length)
    assert place(above, length + 1) >= place(above, length)


def test_a_score_has_to_be_above_in_the_precision_of_live_scores() -> None:
    ones = np.ones(1, dtype=bool)
    assert find_stop(np.array([0.1], dtype=np.float32), ones, 0.1, 1)[0] is None  # float32's 0.1 is more than float64's
    assert find_stop(np.array([0.1], dtype=np.float64), ones, 0.1, 1)[0] is None
    assert find_stop(np.array([], dtype=np.float32), ones[:0], 0.1, 1, run=3) == (None, 3)


@pytest.mark.parametrize(
    ("prompt", "tokens", "inside"),
    [
        ([7, 1, 9], [5, 5, 2, 5], [True, True, False, False]),
        ([7, 1, 9, 2], [5, 1, 5, 2, 1, 5], [False, False, True, False, False, False]),
        ([7], [5, 5], [False, False]),
        ([], [1, 5, 1, 2, 5], [False, True, True, False, False]),
    ],
)
def test_reasoning_is_between_its_marks_and_comes_once(
    prompt: list[int], tokens: list[int], inside: list[bool]
) -> None:
    state, found = MARKS.begins(prompt), []
    for token in tokens:
        one, state = MARKS.follow([token], state)
        found += one.tolist()
    assert found == inside == MARKS.follow(tokens, MARKS.begins(prompt))[0].tolist()


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({}, "above", "Field required"),
        ({"above": float("nan")}, "above", "finite number"),
        ({"above": float("inf")}, "above", "finite number"),
        ({"above": True}, "above", "a number is needed, not true"),
        ({"above": 0, "for": 0}, "for", "greater than or equal to 1"),
        ({"above": 0, "length": 2}, "length", "Extra inputs"),
        ({"above": 0, "for": 1.5}, "for", "valid integer"),
        ({"above": 0, "where": "prompt"}, "where", "'generated' or 'reasoning'"),
        ({"above": 0, "then": "go"}, "then", "'stop' or 'close_reasoning'"),
        ({"above": 0, "below": 1}, "below", "Extra inputs"),
        ({"above": 0, "then": "close_reasoning", "where": "generated"}, "", "must be"),
    ],
)
def test_what_is_not_allowed_is_refused_by_name(fields: dict[str, object], field: str, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        StopWhen.model_validate(fields)
    (error,) = caught.value.errors()
    assert ".".join(map(str, error["loc"])) == field
    assert message in error["msg"]


def when(**fields: str) -> StopWhen:
    return StopWhen.model_validate({"above": 0, **fields})


def test_what_counts_follows_from_what_is_done() -> None:
    assert when().counts == "generated"
    assert when(then="close_reasoning").counts == "reasoning"
    assert when(where="reasoning").counts == "reasoning"
