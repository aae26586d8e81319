from hypothesis import given
from hypothesis import strategies as st

from serve_app.engines.text import TextStream
from tests.serve_app import tiny

WORDS = tiny.tokenizer()
CORE = WORDS.backend_tokenizer


def encode(text: str) -> list[int]:
    return list(WORDS(text, add_special_tokens=False)["input_ids"])


def stream(text: str, *stop: str) -> tuple[list[str], TextStream]:
    """Feed a text byte by byte; return the pieces handed out."""
    out = TextStream(CORE, stop, {})
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
    out = TextStream(CORE, (), {})
    for token in [*encode("ab"), tiny.EOS]:
        out.push(token)
    assert out.text == "ab"


@given(st.lists(st.integers(0, len(CORE.get_vocab()) - 1), max_size=20))
def test_any_tokens_are_the_text_that_the_tokenizer_makes_of_them(tokens: list[int]) -> None:
    out = TextStream(CORE, (), {})
    pieces = []
    for token in tokens:
        out.push(token)
        pieces.append(out.take())
    out.close()
    pieces.append(out.take(final=True))
    assert "".join(pieces) == out.text == CORE.decode(tokens, skip_special_tokens=True)


def test_a_character_that_only_began_is_shown_as_such() -> None:
    out = TextStream(CORE, (), {})
    for token in encode("a🙂")[:-1]:
        out.push(token)
    assert out.take() == "a"
    out.close()
    assert out.take(final=True) == "\ufffd"


def test_a_marker_is_text_although_it_is_special() -> None:
    out = TextStream(CORE, (), {tiny.EOS: "<think>"})
    for token in [*encode("a🙂")[:-1], tiny.EOS, *encode("b")]:
        out.push(token)
    assert out.text == "a\ufffd<think>b"


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
