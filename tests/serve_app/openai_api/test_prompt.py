import pytest

from serve_app.openai_api.chat import Message
from serve_app.openai_api.errors import ApiError
from serve_app.openai_api.prompt import render
from tests.serve_app import tiny

TALK = [
    Message(role="developer", content="Be brief."),
    Message(role="user", content="é?"),
    Message(role="assistant", content="No."),
    Message(role="user", content="Why"),
]


def test_tokens_offsets_and_segments_agree_with_the_text() -> None:
    prompt = render(tiny.tokenizer(), TALK, "tiny")
    assert prompt.text == "[system]Be brief.[user]é?[assistant]No.[user]Why[reply]"
    assert [prompt.text[s.start : s.stop] for s in prompt.segments] == [
        "[system]Be brief.", "[user]é?", "[assistant]No.", "[user]Why",
    ]  # fmt: skip
    assert [s.role for s in prompt.segments] == ["system", "user", "assistant", "user"]
    assert len(prompt.token_ids) == len(prompt.text.encode())
    assert [prompt.text[o] for o in prompt.token_offsets[:4]] == list("[sys")


def test_a_template_that_rewrites_history_has_one_segment() -> None:
    words = tiny.tokenizer()
    words.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert [s.role for s in render(words, TALK, "tiny").segments] == ["prompt"]


def test_a_template_that_refuses_is_quoted() -> None:
    words = tiny.tokenizer()
    words.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ApiError, match="roles must alternate") as caught:
        render(words, TALK, "tiny")
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_a_model_without_a_template_cannot_chat() -> None:
    words = tiny.tokenizer()
    words.chat_template = None
    with pytest.raises(ApiError, match="no chat template"):
        render(words, TALK, "tiny")


def test_a_turn_begins_with_the_token_that_was_sampled_last() -> None:
    prompt = render(tiny.tokenizer(), TALK, "tiny")
    new = prompt.token_ids[prompt.turn_start :]  # one token a byte
    assert len(new) == len(b".[user]Why[reply]")
    assert render(tiny.tokenizer(), TALK[:2], "tiny").turn_start == 0


def test_a_turn_whose_words_the_template_changes_begins_with_its_message() -> None:
    words = tiny.tokenizer()
    words.chat_template = words.chat_template.replace("{{ m.content }}", "{{ m.content | upper }}")
    prompt = render(words, TALK, "tiny")
    assert prompt.text[prompt.token_offsets[prompt.turn_start] :].startswith("[assistant]")
