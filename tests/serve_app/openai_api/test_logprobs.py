"""Log-probabilities of completions: every token has a name of its own, and offsets are places in the text that is sent."""

import codecs
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from serve_app.engines.protocol import TokenScore
from serve_app.engines.text import TextStream
from serve_app.models.tokenization import token_bytes, tokenize_text
from serve_app.openai_api.logprobs import Offsets, chat_logprobs, completion_logprobs
from tests.serve_app import tiny
from tests.serve_app.tokenizers import KINDS

WORDS = tiny.tokenizer()
CORE = WORDS.backend_tokenizer
CHARACTERS = st.text(st.sampled_from("ab é🙂👩‍🚀日本語\ufffd"), max_size=12)


def offsets(words: PreTrainedTokenizerFast = WORDS, *stop: str, after: tuple[int, ...] = ()) -> Offsets:
    return Offsets(words, TextStream(words.backend_tokenizer, stop, {}, after))


def in_chunks(ids: list[int], sizes: list[int], counted: Offsets) -> list[int]:
    found: list[int] = []
    for size in sizes:
        found += counted.of(ids[len(found) : len(found) + size])
    return [*found, *counted.of(ids[len(found) :])]


def test_the_token_that_came_is_among_the_alternatives() -> None:
    a, b, c = (WORDS(letter)["input_ids"][0] for letter in "abc")
    scores = [TokenScore(-3.0, ((b, -0.1), (c, -2.5))), TokenScore(-0.1, ((b, -0.1), (c, -2.5))), TokenScore(-1.0)]
    found = completion_logprobs(WORDS, [a, b, c], [None, *scores][1:], offsets())
    assert found["top_logprobs"] == [{"b": -0.1, "c": -2.5, "a": -3.0}, {"b": -0.1, "c": -2.5}, {"c": -1.0}]
    assert found["token_logprobs"] == [-3.0, -0.1, -1.0]


def test_parts_of_characters_are_told_apart_by_their_bytes() -> None:
    ids = list(WORDS("🙂", add_special_tokens=False)["input_ids"])
    others = tuple((token, -1.0 - place) for place, token in enumerate(range(128, 148)))
    found = completion_logprobs(WORDS, ids, [TokenScore(-9.0, others)] * 4, offsets())
    assert found["tokens"] == ["bytes:\\xf0", "bytes:\\x9f", "bytes:\\x99", "bytes:\\x82"]
    assert [len(top or {}) for top in found["top_logprobs"]] == [
        len({*ids[i : i + 1], *range(128, 148)}) for i in range(4)
    ]
    (first, *_) = chat_logprobs(WORDS, ids, [TokenScore(-9.0, others)] * 4)["content"]
    assert (first["token"], first["bytes"]) == ("\\xf0", [0xF0])


def test_of_two_tokens_with_one_text_the_more_likely_stays() -> None:
    words = KINDS["first"]()
    byte, letter = words.convert_tokens_to_ids(["<0x61>", "a"])
    for came, other in ((byte, letter), (letter, byte)):
        found = completion_logprobs(words, [came], [TokenScore(-5.0, ((other, -0.1),))], offsets(words))
        assert found["top_logprobs"] == [{"a": -0.1}]
        assert found["token_logprobs"] == [-5.0]


@settings(deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=4) | st.sampled_from(["é", "🙂", "日本", "\ufffd"]).map(str.encode), max_size=6),
       st.lists(st.integers(0, 3)))  # fmt: skip
def test_offsets_of_any_bytes(pieces: list[bytes], sizes: list[int]) -> None:
    """Each token is a byte: it begins the first character of the text that it has any part in."""
    raw = b"".join(pieces)
    alphabet, vocabulary = bytes_to_unicode(), WORDS.get_vocab()
    ids = [vocabulary[alphabet[byte]] for byte in raw]
    expected, decoder, n_whole, open_since = [], codecs.getincrementaldecoder("utf-8")("replace"), 0, None
    for byte in raw:
        made = decoder.decode(bytes([byte]))
        n_whole += len(made)
        held = bool(decoder.getstate()[0])
        begins = n_whole if held and not (made == "" and open_since is not None) else n_whole - len(made[-1:])
        open_since = begins if held else None
        expected.append(begins)
    assert offsets().of(ids) == expected == in_chunks(ids, sizes, offsets())


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50, deadline=None)
@given(text=CHARACTERS, sizes=st.lists(st.integers(0, 3)))
def test_a_token_s_text_is_where_its_offset_says(kind: str, text: str, sizes: list[int]) -> None:
    words = KINDS[kind]()
    ids = list(words(f"one{text}one", add_special_tokens=False)["input_ids"])
    stream = TextStream(words.backend_tokenizer, (), {})
    for token in ids:
        stream.push(token)
    stream.close()
    found = completion_logprobs(words, ids, [TokenScore(0.0)] * len(ids), offsets(words))
    starts = found["text_offset"]
    assert starts == sorted(starts)
    assert starts == in_chunks(ids, sizes, offsets(words))
    for (start, stop), token, spelled in zip(pairwise([*starts, len(stream.text)]), ids, found["tokens"], strict=True):
        if not spelled.startswith("bytes:") and token not in words.all_special_ids:
            assert stream.text[start:stop].strip() == spelled.replace("##", "").strip()


def test_what_a_stop_string_cuts_off_begins_where_the_text_ends() -> None:
    ids = list(WORDS("ab🙂c", add_special_tokens=False)["input_ids"])
    assert offsets(WORDS, "b🙂").of(ids[:6]) == [0, 1, 1, 1, 1, 1]
    assert Offsets(WORDS, TextStream(CORE, ("b🙂",), {}), start=7, min_tokens=9).of(ids) == [7, 8, 9, 9, 9, 9, 10]


def test_a_special_token_is_no_text() -> None:
    ids = list(WORDS("🙂b", add_special_tokens=False)["input_ids"])
    assert offsets().of([*ids, tiny.EOS, *ids]) == [0, 0, 0, 0, 1, 2, 2, 2, 2, 2, 3]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "word piece"])
@settings(max_examples=50, deadline=None)
@given(text=CHARACTERS)
def test_an_echoed_token_is_where_its_offset_says(kind: str, text: str) -> None:
    words = KINDS[kind]()
    text = text.lstrip()  # some put a space before a text, and it could not be told from the text's own
    raw = tokenize_text(words, text)
    ids = raw.prompt.token_ids
    starts = completion_logprobs(words, ids, [None] * len(ids), offsets(words), raw.echo_offsets)["text_offset"]
    assert starts == sorted(starts)
    begun = 0  # bytes of the text that the tokens before had
    for token, start in zip(ids, starts, strict=True):
        own = b"" if token in words.all_special_ids else token_bytes(words, token)
        whole = text.encode()
        if not whole.startswith(own, begun):  # the space that some put before a text
            own = own.removeprefix(b" ")
        assert start == len(whole[:begun].decode("utf-8", "ignore")), (token, own)
        begun += len(own)
    assert begun == len(text.encode())
