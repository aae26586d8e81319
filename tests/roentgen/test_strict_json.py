"""Valid JSON is parsed like Python's parser does; anything else is rejected with the field's name."""

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roentgen.strict_json import MAX_DEPTH, JsonError, read_json

HALF = "\ud83d"
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def refused(body: bytes) -> JsonError:
    with pytest.raises(JsonError) as caught:
        read_json(body)
    str(caught.value).encode()  # it can be sent
    return caught.value


def nested(depth: int, inner: Any = 1) -> Any:
    for _ in range(depth):
        inner = {"a": inner}
    return inner


@settings(deadline=None)
@given(VALUES, st.booleans(), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]))
def test_json_comes_through_exactly(value: Any, escaped: bool, encoding: str) -> None:
    parsed = read_json(json.dumps({"it": value}, ensure_ascii=escaped).encode(encoding))
    assert repr(parsed) == repr({"it": value})  # -0.0 is not 0.0, and 1 is not true


@settings(deadline=None)
@given(VALUES, st.lists(st.text(st.characters(codec="ascii"), max_size=3) | st.integers(0, 2), max_size=5))
def test_half_a_surrogate_pair_is_named_wherever_it_is(around: Any, way: list[str | int]) -> None:
    value: Any = HALF
    for step in reversed(way):
        value = {"around": around, step: value} if isinstance(step, str) else [around] * step + [value]
    error = refused(json.dumps({"field": value}).encode())
    assert (error.field, error.no_text) == (".".join(["field", *map(str, way)]), True)


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        (b'{"a": {"\\ud83d": 1}}', "a", "its key '\\ud83d'"),
        (b'{"a": "\\ude00\\ud83d"}', "a", "an unpaired surrogate"),
        (b'{"a": [1, NaN]}', "a.1", "NaN"),
        (b'{"a": {"b": -Infinity}}', "a.b", "-Infinity"),
        (b'{"a": 1e400}', "a", "too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a", "more than 4300 digits"),
        (b'{"a": {"b": 1, "b": 2}}', "a.b", "duplicate key"),
        (json.dumps({"deep": nested(900)}).encode(), "deep", "nested more than"),
        (b'{"a":' * 100_000, None, "nested more than"),
        (b"[" * 100_000, None, "nested more than"),
        (b'{"a": "\xff"}', None, "not UTF-8"),
        (b'{"a": "\xed\xa0\xbd"}', None, "not UTF-8"),
        (b"{", None, "not JSON"),
        (b"NaN", None, "NaN"),
        (b'"\\ud83d"', None, "an unpaired surrogate"),
    ],
)
def test_what_json_does_not_have_is_refused_by_name(body: bytes, field: str | None, words: str) -> None:
    error = refused(body)
    assert error.field == field
    assert words in str(error)


def test_a_name_that_a_client_made_up_is_cut() -> None:
    assert len(str(refused(json.dumps({"x" * 10_000: HALF}).encode()))) < 1000
    assert len(str(refused(json.dumps({"x" * 10_000 + HALF: 1}).encode()))) < 1000


def test_the_depth_that_is_allowed_comes_through() -> None:
    whole = nested(MAX_DEPTH)
    assert read_json(json.dumps(whole).encode()) == whole
    refused(json.dumps(nested(MAX_DEPTH + 1)).encode())


@pytest.mark.parametrize("number", [2**63 - 1, -(2**63), 2**70, 10**4000, 1e308, 5e-324, 0.1 + 0.2])
def test_numbers_keep_their_digits(number: float) -> None:
    (parsed,) = read_json(json.dumps([number]).encode())
    assert parsed == number
    assert type(parsed) is type(number)
    assert math.copysign(1, read_json(b"-0.0")) == -1
