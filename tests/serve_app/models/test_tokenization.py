"""Every route tokenizes a text like its tokenizer, and its offsets refer to the stored text."""

from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from roentgen.contract import RolloutKey
from roentgen.transcripts import Transcript
from serve_app.engines.text import TextStream
from serve_app.engines.transformers.loaded_model import LoadedModel
from serve_app.models.tokenization import completed, decode, decode_tokens, tokenize_text
from serve_app.openai_api.completions import raw_prompt
from serve_app.openai_api.errors import ApiError
from serve_app.openai_api.messages import Message
from serve_app.openai_api.prompt import render
from serve_app.openai_api.tokenize import DetokenizeRequest, TokenizeRequest, detokenize, tokenize
from serve_app.teacher_forcing.tokens import transcript_tokenizer
from tests.serve_app import tiny
from tests.serve_app.tokenizers import KINDS

CORE = tiny.tokenizer().backend_tokenizer
KEY = RolloutKey(config_hash="c", problem_id="p")
TEXTS = st.one_of(
    st.text(alphabet=st.sampled_from(list("onetwhra 12\n.▁éÅ中🙂")), max_size=12),
    st.lists(st.sampled_from(["one", " ", "two", "<s>", "</s>", "<sep>", "\n", "  ", "hello", "▁"]), max_size=6).map(
        "".join
    ),
)
TALK = [
    {"role": "user", "content": "one two"},
    {"role": "assistant", "content": " three"},
    {"role": "user", "content": "o"},
]


@cache
def words(kind: str) -> PreTrainedTokenizerFast:
    return KINDS[kind]()


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(kind: str) -> LoadedModel:
    return replace(tiny.loaded("llama"), tokenizer=words(kind))


def check_offsets(text: str, token_ids: list[int], offsets: list[int]) -> None:
    assert len(offsets) == len(token_ids)
    assert offsets == sorted(offsets)
    assert all(0 <= offset <= len(text) for offset in offsets)


@settings(max_examples=60, deadline=None)
@given(text=TEXTS, special=st.booleans())
def test_tokens_are_the_tokenizers_and_offsets_are_where_it_puts_them(kind: str, text: str, special: bool) -> None:
    tokenizer = words(kind)
    raw = tokenize_text(tokenizer, text, add_special_tokens=special)
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    assert raw.prompt.token_ids == encoded["input_ids"]
    assert raw.prompt.text[raw.own] == text
    check_offsets(raw.prompt.text, raw.prompt.token_ids, raw.prompt.token_offsets)
    for token, at, sequence, (start, _) in zip(
        raw.prompt.token_ids, raw.prompt.token_offsets, encoded.sequence_ids(0), encoded["offset_mapping"], strict=True
    ):
        if sequence is None:  # what the tokenizer adds stands in the text, where its offset says
            assert raw.prompt.text[at:].startswith(tokenizer.convert_ids_to_tokens(token))
        else:
            assert at == raw.own.start + start


@settings(max_examples=40, deadline=None)
@given(text=TEXTS)
def test_every_route_gives_the_same(kind: str, model: LoadedModel, text: str) -> None:
    tokenizer = words(kind)
    expected = tokenizer(text)["input_ids"]
    assert tokenize(model, TokenizeRequest(model="m", prompt=text))["tokens"] == expected
    if not expected:
        with pytest.raises(ApiError, match="prompt: empty"):
            raw_prompt(tokenizer, text, add_special_tokens=True)
        return
    sent = raw_prompt(tokenizer, text, add_special_tokens=True)
    assert sent.prompt.token_ids == expected
    assert sent.echo == text
    assert transcript_tokenizer(model)(Transcript(KEY, text)).sequence == sent.prompt
    as_tokens = raw_prompt(tokenizer, expected, add_special_tokens=True).prompt
    if as_tokens.text == sent.prompt.text:  # tokens may not say all of a text (<unk>, a space that was put before it)
        assert as_tokens == sent.prompt


@settings(max_examples=40, deadline=None)
@given(prompt=TEXTS, completion=TEXTS)
def test_a_completion_stands_where_it_would_have_been_generated(
    kind: str, model: LoadedModel, prompt: str, completion: str
) -> None:
    tokenizer = words(kind)
    opened = tokenize_text(tokenizer, prompt).opened.prompt
    if not opened.token_ids:
        return
    text = transcript_tokenizer(model)(Transcript(KEY, prompt, completion, "length")).sequence
    n_prompt = len(opened.token_ids)
    assert text.token_ids[:n_prompt] == opened.token_ids
    assert (text.n_prompt, text.text[: len(opened.text)]) == (n_prompt, opened.text)
    check_offsets(text.text, text.token_ids, text.token_offsets)
    whole = tokenize_text(tokenizer, prompt + completion).opened.prompt.token_ids
    if whole[:n_prompt] == opened.token_ids:
        assert text.token_ids == whole


def test_the_templates_own_beginning_is_not_doubled(kind: str) -> None:
    tokenizer = words(kind)
    prompt = render(tokenizer, [Message.model_validate(message) for message in TALK], "m").prompt
    expected = tokenizer.apply_chat_template(TALK, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert prompt.token_ids == list(expected)
    begin = tokenizer.bos_token_id
    assert [token for token in prompt.token_ids if token == begin] == [begin]
    check_offsets(prompt.text, prompt.token_ids, prompt.token_offsets)


@pytest.mark.parametrize(
    ("scheme", "first"), [("first", "▁one"), ("always", "▁one"), ("never", "one"), ("normalizer", "▁one")]
)
def test_the_first_word_is_spelled_as_the_model_learned_it(scheme: str, first: str) -> None:
    tokenizer = words(scheme)
    raw = tokenize_text(tokenizer, "one two")
    assert tokenizer.convert_ids_to_tokens(raw.prompt.token_ids) == ["<s>", first, "▁two"]
    assert (raw.prompt.text, raw.prompt.token_offsets) == ("<s>one two", [0, 3, 6])


def test_what_ends_a_text_is_in_it_unless_the_text_goes_on() -> None:
    raw = tokenize_text(words("first, begins and ends"), "one two")
    assert (raw.prompt.text, raw.prompt.token_offsets) == ("<s>one two</s>", [0, 3, 6, 10])
    assert (raw.opened.prompt.text, raw.opened.prompt.token_ids) == ("<s>one two", raw.prompt.token_ids[:-1])
    empty = tokenize_text(words("first, begins and ends"), "")
    assert (empty.prompt.text, empty.prompt.token_offsets, empty.opened.prompt.text) == ("<s></s>", [0, 3], "<s>")
    assert empty.opened.prompt.token_ids == empty.prompt.token_ids[:1]


@pytest.mark.parametrize(
    ("scheme", "prompt", "completion", "pieces"),
    [
        ("first", "one", " two", ["▁two"]),
        ("always", "one", " two", ["▁two"]),
        ("normalizer", "one", " two", ["▁two"]),
        ("first", "tw", "o", ["o"]),  # together they are one token, and alone it would begin a word
        ("always", "tw", "o", ["o"]),
        ("byte level, prefix space", "tw", "o", ["o"]),
    ],
)
def test_a_completion_is_spelled_as_a_continuation(
    scheme: str, prompt: str, completion: str, pieces: list[str]
) -> None:
    tokenizer = words(scheme)
    tokenize = transcript_tokenizer(replace(tiny.loaded("llama"), tokenizer=tokenizer))
    text = tokenize(Transcript(KEY, prompt, completion, "length")).sequence
    assert tokenizer.convert_ids_to_tokens(text.token_ids[text.n_prompt :]) == pieces
    assert text.text == f"<s>{prompt}{completion}"


@pytest.mark.parametrize("scheme", ["first", "always", "normalizer", "never"])
def test_the_space_before_a_completions_first_word_is_kept(scheme: str) -> None:
    """Decoded alone, a first word has none; after a prompt it has."""
    tokenizer = words(scheme)
    prompt = tokenizer("one")["input_ids"]
    two = tokenizer.convert_tokens_to_ids(["▁two", "▁three"])
    core = tokenizer.backend_tokenizer
    assert decode(core, two, after=prompt) == (" two three", [0, 4])
    stream = TextStream(core, (), {}, prompt)
    for token in two:
        stream.push(token)
    assert stream.text == " two three"
    # A text begins after a special token, as it does without anything before it.
    for before in (prompt[:0], prompt[:1]):
        assert decode(core, two, after=before)[0].lstrip() == "two three"


def test_tokens_beyond_the_embedding_are_refused_by_name() -> None:
    model = tiny.loaded("llama")
    assert model.n_embeddings == 257
    for tokens in ([1, 257], [2**40]):
        with pytest.raises(
            ApiError, match=rf"prompt: {tokens[-1]} is out of vocabulary; the model has 257 tokens, 0–256"
        ) as caught:
            raw_prompt(model.tokenizer, tokens, add_special_tokens=True, n_embeddings=model.n_embeddings)
        assert (caught.value.status, caught.value.param) == (400, "prompt")
        with pytest.raises(
            ApiError, match=rf"tokens: {tokens[-1]} is out of vocabulary; the model has 257 tokens, 0–256"
        ):
            detokenize(model, DetokenizeRequest(model="m", tokens=tokens))


def test_text_whose_tokens_the_embedding_does_not_have_is_refused() -> None:
    model = tiny.loaded("llama")
    model.tokenizer.add_tokens(["<new>"])
    with pytest.raises(ApiError, match="prompt: 257 is out of vocabulary; the model has 257 tokens, 0–256"):
        raw_prompt(model.tokenizer, "a<new>", add_special_tokens=True, n_embeddings=model.n_embeddings)


def test_an_embedding_larger_than_the_tokenizer_is_all_the_models() -> None:
    prompt = raw_prompt(tiny.tokenizer(), [65, 300], add_special_tokens=True, n_embeddings=512).prompt
    assert (prompt.token_ids, len(prompt.token_offsets)) == ([65, 300], 2)


@given(st.lists(st.integers(0, len(CORE.get_vocab()) - 1), max_size=20))
def test_offsets_belong_to_the_text_that_the_tokenizer_makes(tokens: list[int]) -> None:
    text, offsets = decode(CORE, tokens)
    assert text == CORE.decode(tokens, skip_special_tokens=False)
    check_offsets(text, tokens, offsets)


def test_a_completion_comes_after_its_prompt_with_its_special_tokens() -> None:
    tokens = [*CORE.encode("hé", add_special_tokens=False).ids, tiny.EOS]
    prompt = decode_tokens(tiny.tokenizer(), [65, 66]).prompt
    whole = completed(tiny.tokenizer(), prompt, tokens, "assistant")
    assert (whole.text, whole.n_prompt, whole.n_completion, whole.n_rows) == (prompt.text + "hé<eos>", 2, 4, 5)
    assert whole.token_offsets == [0, 1, 2, 3, 3, 4]
    assert [(s.role, s.start, s.stop) for s in whole.segments] == [("prompt", 0, 2), ("assistant", 2, 9)]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_tokens_have_a_text_that_only_grows(kind: str, data: st.DataObject) -> None:
    """A sampled token may be any: also a byte that is part of no character."""
    core = words(kind).backend_tokenizer
    special = {place for place, token in core.get_added_tokens_decoder().items() if token.special}
    ids = st.integers(0, len(words(kind)) - 1).filter(lambda token: token not in special)
    tokens = data.draw(st.lists(ids, max_size=14))
    stream, seen = TextStream(core, (), {}), [""]
    for token in tokens:
        stream.push(token)
        seen.append(stream.text)
    stream.close()
    assert all(later.startswith(earlier) for earlier, later in zip(seen, [*seen[1:], stream.text], strict=True))
    text, offsets = decode(core, tokens)
    assert text == stream.text
    check_offsets(text, tokens, offsets)
    try:
        whole = [DecodeStream(skip_special_tokens=False)]
        pieces = [whole[0].step(core, token) or "" for token in tokens]
    except Exception:  # noqa: BLE001 - tokenizers takes a character back: what was given stays
        return
    assert text.startswith("".join(pieces))


@pytest.mark.parametrize("scheme", ["first", "always", "normalizer"])
def test_bytes_that_are_no_character_do_not_take_back_the_one_before(scheme: str) -> None:
    tokenizer = words(scheme)
    stray = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in [*"Њ".encode(), 0x9A, 0x9A]]
    text, _ = decode(tokenizer.backend_tokenizer, [*stray, tokenizer.convert_tokens_to_ids("▁ab")])
    assert text == "Њ\ufffd\ufffd ab"
