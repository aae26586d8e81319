from hypothesis import given
from hypothesis import strategies as st

from serve_app.engines.text import TextStream, completion_offsets
from tests.serve_app import tiny

WORDS = tiny.tokenizer()
CORE = WORDS.backend_tokenizer


def encode(text: str) -> list[int]:
    return list(WORDS(text, add_special_tokens=False)["input_ids"])


def stream(text: str, *stop: str) -> tuple[list[str], TextStream]:
    """Feed a text byte by byte; return the pieces handed out."""
    out = TextStream(CORE, stop)
    pieces = []
    for token in encode(text):
        out.push(token)
        pieces.append(out.take())
        if out.stopped:
            break
    pieces.append(out.take(final=True))
    return pieces, out


def test_a_character_of_several_tokens_comes_whole() -> None:
    pieces, _ = stream("é🙂x")
    assert [p for p in pieces if p] == ["é", "🙂", "x"]


def test_special_tokens_are_not_text() -> None:
    out = TextStream(CORE, ())
    for token in [*encode("ab"), tiny.EOS]:
        out.push(token)
    assert out.text == "ab"


def test_text_that_could_begin_a_stop_string_is_held() -> None:
    pieces, out = stream("one\n\ntwo", "\n\nQ")
    assert "".join(pieces) == "one\n\ntwo"
    assert not out.stopped
    at = pieces.index("\n\nt")
    assert pieces[at - 2 : at] == ["", ""]


def test_the_first_of_several_stop_strings_wins() -> None:
    pieces, out = stream("a STOP b END", "END", "STOP", "TOP")
    assert out.stopped
    assert "".join(pieces) == "a "


@given(
    st.text(alphabet="abé🙂 \n", max_size=30), st.lists(st.text(alphabet="ab\n", min_size=1, max_size=3), max_size=3)
)
def test_what_is_handed_out_is_the_text_before_the_first_stop(text: str, stops: list[str]) -> None:
    pieces, out = stream(text, *stops)
    # Independent rule: the text up to where the shortest prefix holding a stop string ends, without that string.
    expected = text
    for end in range(len(text) + 1):
        hits = [text[:end].find(s) for s in stops if s in text[:end]]
        if hits:
            expected = text[: min(hits)]
            break
    assert "".join(pieces) == out.text == expected


def test_offsets_cover_the_completion_with_its_special_tokens() -> None:
    tokens = [*encode("hé"), tiny.EOS]
    text, offsets = completion_offsets(CORE, tokens, start=10)
    assert text == "hé<eos>"
    assert offsets == [10, 11, 11, 12]
