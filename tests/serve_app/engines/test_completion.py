"""A growing completion: its deltas add up to its result, whatever its tokens and stop strings are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.engines.completion import CompletionState
from serve_app.engines.protocol import Event, Finished, GenerationJob, Sampling, TextDelta, TokenScore
from serve_app.engines.text import TextStream
from tests.serve_app import tiny

WORDS = tiny.tokenizer()
CORE = WORDS.backend_tokenizer


def ignore(event: Event) -> None:
    """Hear nothing."""


def complete(
    tokens: list[int], sampling: Sampling, *, markers: dict[int, str] | None = None
) -> tuple[list[TextDelta], Finished]:
    """Push tokens as an engine does, until the completion ends; returns the deltas and the result."""
    job = GenerationJob([1], sampling, ignore, stream=True)
    text = TextStream(CORE, sampling.stop, markers or {})
    completion = CompletionState(job=job, text=text, all_stop_token_ids=frozenset({tiny.EOS}) | sampling.stop_token_ids)
    deltas, reason = [], None
    for number, token in enumerate(tokens):
        reason = completion.push(token, TokenScore(-float(number)))
        if (delta := completion.delta(final=reason is not None)) is not None:
            deltas.append(delta)
        if reason is not None:
            break
    return deltas, completion.finished(reason or "length")


def ids(text: str) -> list[int]:
    return list(WORDS(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    ("least", "text", "tokens"),
    [(0, "x", 3), (3, "x", 3), (4, "xabc", 6), (6, "xabc", 6), (7, "xabcd", 7), (8, "xabcdabe", 8)],
)
def test_a_stop_string_completed_before_the_least_length_is_text(least: int, text: str, tokens: int) -> None:
    deltas, finished = complete(ids("xabcdabe"), Sampling(8, min_tokens=least, stop=("ab", "da")))
    assert (finished.text, len(finished.token_ids)) == (text, tokens)
    assert "".join(delta.text for delta in deltas) == text


def expected(text: str, sampling: Sampling) -> str:
    """The text that a completion of at most `max_tokens` has, found character by character."""
    for end in range(1, len(text) + 1):
        used = len(text[:end].encode())  # a token is a byte
        if used > sampling.max_tokens:
            return text[: end - 1] + "\ufffd" * (len(text[: end - 1].encode()) < sampling.max_tokens)
        found = [len(stop) for stop in sampling.stop if text[:end].endswith(stop)]
        if found and used >= sampling.min_tokens:
            return text[: end - max(found)]
    return text


PIECES = st.text(alphabet="abé🙂", min_size=1, max_size=3)
SAMPLINGS = st.builds(
    Sampling,
    max_tokens=st.integers(1, 24),
    min_tokens=st.integers(0, 16),
    stop=st.lists(PIECES, max_size=3).map(tuple),
)


@given(st.text(alphabet="abé🙂", max_size=16), SAMPLINGS)
def test_the_text_ends_before_the_first_stop_string_that_may_end_it(text: str, sampling: Sampling) -> None:
    deltas, finished = complete([*ids(text), *ids("z" * 24)], sampling)
    whole = expected(text + "z" * 24, sampling)
    assert finished.text == whole
    assert "".join(delta.text for delta in deltas) == whole


@given(st.lists(st.integers(0, 255), min_size=24, max_size=24), SAMPLINGS, st.integers(0, 24))
def test_a_stream_has_the_text_tokens_and_scores_of_the_whole(tokens: list[int], sampling: Sampling, ends: int) -> None:
    tokens.insert(ends, tiny.EOS)
    deltas, finished = complete(tokens, sampling, markers={ord("m"): "<think>"})
    spoken = len(finished.token_ids) - (finished.ended_by is not None)
    assert "".join(delta.text for delta in deltas) == finished.text
    assert [token for delta in deltas for token in delta.token_ids] == finished.token_ids[:spoken]
    assert [score for delta in deltas for score in delta.scores] == finished.scores[:spoken]
