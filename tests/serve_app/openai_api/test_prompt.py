import logging
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from serve_app.openai_api.errors import ApiError
from serve_app.openai_api.messages import Message, Tool
from serve_app.openai_api.prompt import Rendered, render
from tests.serve_app import tiny
from tests.serve_app.openai_api.templates import GEMMA, LLAMA, PARTS, QWEN
from tests.serve_app.tokenizers import sentencepiece

TALK = [
    Message(role="developer", content="Be brief."),
    Message(role="user", content="é?"),
    Message(role="assistant", content="No."),
    Message(role="user", content="Why"),
]
ADD = Tool.model_validate({"type": "function", "function": {"name": "add", "description": "Sums.", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}}}}})  # fmt: skip


def call(call_id: str, arguments: str = '{"a": 1}') -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "add", "arguments": arguments}}


CALLED = [
    Message(role="user", content="1 and 2?"),
    Message.model_validate({"role": "assistant", "content": "I add.", "tool_calls": [call("x"), call("y")]}),
    Message(role="tool", content="second", tool_call_id="y"),
    Message(role="tool", content="first", tool_call_id="x"),
]


def words_with(template: str | None) -> PreTrainedTokenizerFast:
    words = tiny.tokenizer()
    words.chat_template = template
    return words


def new_text(rendered: Rendered) -> str:
    return rendered.prompt.text[rendered.prompt.token_offsets[rendered.turn_start] :]


def test_tokens_offsets_and_segments_agree_with_the_text() -> None:
    rendered = render(tiny.tokenizer(), TALK, "tiny")
    assert rendered.prompt.text == "[system]Be brief.[user]é?[assistant]No.[user]Why[reply]"
    assert [rendered.prompt.text[s.start : s.stop] for s in rendered.prompt.segments] == [
        "[system]Be brief.", "[user]é?", "[assistant]No.", "[user]Why",
    ]  # fmt: skip
    assert [s.role for s in rendered.prompt.segments] == ["system", "user", "assistant", "user"]
    assert len(rendered.prompt.token_ids) == len(rendered.prompt.text.encode())
    assert [rendered.prompt.text[o] for o in rendered.prompt.token_offsets[:4]] == list("[sys")


def test_a_template_that_rewrites_history_has_one_segment() -> None:
    words = words_with("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}")
    assert [s.role for s in render(words, TALK, "tiny").prompt.segments] == ["prompt"]


@pytest.mark.parametrize("template", ["{{ raise_exception('roles must alternate') }}", "{{ 'roles' + 3 }}"])
def test_a_template_that_refuses_is_quoted(template: str) -> None:
    with pytest.raises(ApiError, match=r"chat template of tiny refuses them: .*(roles must|str)") as caught:
        render(words_with(template), TALK, "tiny")
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_a_model_without_a_template_cannot_chat() -> None:
    with pytest.raises(ApiError, match="no chat template"):
        render(words_with(None), TALK, "tiny")


def test_a_turn_begins_with_the_token_that_was_sampled_last() -> None:
    assert new_text(render(tiny.tokenizer(), TALK, "tiny")) == ".[user]Why[reply]"
    assert render(tiny.tokenizer(), TALK[:2], "tiny").turn_start == 0


def test_a_turn_begins_there_too_when_the_template_rewrites_history() -> None:
    # The words are said again by the user: only what the assistant said counts.
    talk = [*TALK[:3], Message(role="user", content="No. No. No.")]
    rendered = render(words_with(QWEN), talk, "tiny")
    assert [s.role for s in rendered.prompt.segments] == ["prompt"]
    assert new_text(rendered) == ".<|im_end|>\n<|im_start|>user\nNo. No. No.<|im_end|>\n<|im_start|>assistant\n"


def test_a_turn_whose_words_the_template_changes_begins_with_them() -> None:
    words = words_with(str(tiny.tokenizer().chat_template).replace("{{ m.content }}", "{{ m.content | upper }}"))
    assert new_text(render(words, TALK, "tiny")).startswith("NO.[user]")


def test_a_template_that_calls_as_hermes_gets_the_tools() -> None:
    rendered = render(words_with(QWEN), CALLED, "tiny", tools=[ADD])
    assert '<|im_start|>system\nTools:\n{"type": "function", "function": {"name": "add"' in rendered.prompt.text
    block = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert f"I add.\n{block}\n{block}<|im_end|>" in rendered.prompt.text
    # The model sees no ids: the results stand in the order of the calls.
    assert new_text(rendered) == (
        "><|im_end|>\n<|im_start|>user\n<tool_response>\nfirst\n</tool_response>\n"
        "<tool_response>\nsecond\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_what_tools_say_is_theirs() -> None:
    talk = [*CALLED[:1], CALLED[1].model_copy(update={"reasoning_content": "Hm."}), *CALLED[2:]]
    rendered = render(words_with(QWEN), talk, "tiny", tools=[ADD])
    assert [s.role for s in rendered.prompt.segments] == ["user", "assistant", "tool"]
    assert "<think>\nHm.\n</think>\n\nI add." in rendered.prompt.text
    assert rendered.prompt.text[rendered.prompt.segments[2].start :].startswith(
        "<|im_start|>user\n<tool_response>\nfirst"
    )


@pytest.mark.parametrize("template", [str(tiny.tokenizer().chat_template), LLAMA])
def test_other_templates_are_told_in_plain_words(template: str) -> None:
    rendered = render(words_with(template), [TALK[0], *CALLED], "tiny", tools=[ADD])
    before, _, after = rendered.prompt.text.partition("[user]1 and 2?")
    assert before.startswith("[system]Be brief.\n\nYou may call these functions:\n")
    assert '{"name": "add", "description": "Sums.", "parameters": {"type": "object"' in before
    assert '<tool_call>\n{"name": "function_name"' in before
    block = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert after.startswith(f"[assistant]I add.\n{block}\n{block}[user]<tool_response>\nfirst\n</tool_response>\n")
    assert [s.role for s in rendered.prompt.segments] == ["system", "user", "assistant", "tool"]
    assert new_text(rendered).startswith(">[user]<tool_response>")


def test_calls_are_written_as_the_model_wrote_them() -> None:
    cut = Message.model_validate({"role": "assistant", "content": None, "tool_calls": [call("x", '{"a":  1, "b')]})
    for template in (QWEN, str(tiny.tokenizer().chat_template)):
        rendered = render(words_with(template), [CALLED[0], cut, CALLED[3]], "tiny", tools=[ADD])
        assert '<tool_call>\n{"name": "add", "arguments": {"a":  1, "b}\n</tool_call>' in rendered.prompt.text


def test_a_strict_template_sees_turns_and_no_system_message() -> None:
    talk = [*CALLED, Message(role="user", content="Quick!")]
    rendered = render(words_with(GEMMA), talk, "tiny", tools=[ADD])
    assert rendered.prompt.text.startswith("<turn>user\nYou may call these functions:\n")
    assert "just write the answer.\n\n1 and 2?</turn>" in rendered.prompt.text
    assert "</tool_response>\nQuick!</turn>\n<turn>model\n" in rendered.prompt.text


def test_a_history_of_calls_needs_no_tools() -> None:
    rendered = render(words_with(GEMMA), CALLED, "tiny")
    assert "functions" not in rendered.prompt.text
    assert (
        "<tool_response>\nfirst\n</tool_response>\n<tool_response>\nsecond\n</tool_response></turn>"
        in rendered.prompt.text
    )


def test_a_result_of_no_call_is_refused() -> None:
    with pytest.raises(ApiError, match=r"messages\.1\.tool_call_id: 'x' is not a call of") as caught:
        render(tiny.tokenizer(), [CALLED[0], CALLED[3]], "tiny")
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_variables_of_the_template_can_be_set() -> None:
    rendered = render(words_with(QWEN), TALK, "tiny", template_kwargs={"enable_thinking": False})
    assert rendered.prompt.text.endswith("<think>\n\n</think>\n\n")
    assert not render(words_with(QWEN), TALK, "tiny", template_kwargs={"enable_thinking": True}).prompt.text.endswith(
        "\n\n"
    )


@pytest.mark.parametrize(
    "name", ["messages", "tools", "add_generation_prompt", "tokenize", "chat_template", "bos_token"]
)
def test_variables_that_are_not_the_client_s_are_refused(name: str) -> None:
    words = words_with(
        QWEN + "{{ bos_token }}{% generation %}{% endgeneration %}{% for m in messages %}{% break %}{% endfor %}"
    )
    with pytest.raises(
        ApiError, match=f"{name}' may not be set for the chat template of tiny; allowed are enable_thinking$"
    ) as caught:
        render(words, TALK, "tiny", template_kwargs={name: False})
    assert (caught.value.status, caught.value.param) == (400, "chat_template_kwargs")


def test_a_variable_that_the_template_does_not_use_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="serve_app.openai_api.prompt"):
        rendered = render(words_with(QWEN), TALK, "tiny", template_kwargs={"think": 1, "enable_thinking": False})
    assert rendered.prompt == render(words_with(QWEN), TALK, "tiny", template_kwargs={"enable_thinking": False}).prompt
    assert ["'think'" in record.getMessage() for record in caplog.records] == [True]


IN_PARTS = [
    Message.model_validate({"role": role, "content": [{"type": "text", "text": text} for text in texts]})
    for role, *texts in (("system", "Be", "brief."), ("user", "Hi"), ("assistant", "No ", " way."), ("user", "1", "2"))
]


def test_a_template_that_goes_through_parts_gets_them() -> None:
    rendered = render(words_with(PARTS), IN_PARTS, "tiny")
    assert rendered.prompt.text == "[system]<Be><brief.>[user]Hi[assistant]<No><way.>[user]<1><2>[assistant]"
    assert [segment.role for segment in rendered.prompt.segments] == ["system", "user", "assistant", "user"]
    assert new_text(rendered) == ".>[user]<1><2>[assistant]"


@pytest.mark.parametrize("template", [str(tiny.tokenizer().chat_template), QWEN])
def test_any_other_gets_one_text(template: str) -> None:
    joined = [Message(role=message.role, content=message.content) for message in IN_PARTS]
    rendered = render(words_with(template), IN_PARTS, "tiny")
    assert "Be\nbrief." in rendered.prompt.text
    assert rendered == render(words_with(template), joined, "tiny")


def test_an_open_message_ends_the_prompt_and_belongs_to_it() -> None:
    """Against transformers' own `continue_final_message`, with templates that end a message in several ways."""
    talk = [*TALK, Message(role="assistant", content="Because it")]
    plain = [{"role": m.role.replace("developer", "system"), "content": m.content} for m in talk]
    for template in (None, LLAMA):
        words = tiny.tokenizer() if template is None else words_with(template)
        rendered = render(words, talk, "tiny", ending="open")
        expected = words.apply_chat_template(plain, tokenize=False, continue_final_message=True)
        assert rendered.prompt.text == expected
        assert rendered.prompt.text.endswith("[assistant]Because it")
        assert rendered.prompt.n_prompt == len(rendered.prompt.token_ids)
        last = rendered.prompt.segments[-1]
        assert (last.role, rendered.prompt.text[last.start : last.stop]) == ("assistant", "[assistant]Because it")


def test_an_open_message_is_part_of_this_turn() -> None:
    talk = [*TALK, Message(role="assistant", content="Because")]
    assert new_text(render(tiny.tokenizer(), talk, "tiny", ending="open")) == ".[user]Why[assistant]Because"


def test_an_open_message_that_the_template_closes_with_a_marker_stays_open() -> None:
    talk = [Message(role="user", content="1?"), Message(role="assistant", content="It is")]
    text = render(words_with(QWEN), talk, "tiny", ending="open").prompt.text
    assert text == "<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nIt is"


def test_a_conversation_may_end_without_the_words_that_begin_a_reply() -> None:
    rendered = render(tiny.tokenizer(), TALK, "tiny", ending="none")
    assert rendered.prompt.text == "[system]Be brief.[user]é?[assistant]No.[user]Why"


def test_what_the_tokenizer_adds_stands_before_the_segments() -> None:
    words = sentencepiece("first")
    plain, added = (render(words, TALK, "tiny", add_special_tokens=special) for special in (False, True))
    assert added.prompt.token_ids == words(plain.prompt.text, add_special_tokens=True)["input_ids"]
    assert added.prompt.token_ids != plain.prompt.token_ids
    assert added.turn_start == plain.turn_start + 1
    assert [added.prompt.text[s.start : s.stop] for s in added.prompt.segments] == [
        plain.prompt.text[s.start : s.stop] for s in plain.prompt.segments
    ]
