import pickle
from typing import Any

import pytest
from openai.types.chat import ParsedChatCompletionMessage
from pydantic import BaseModel, TypeAdapter, ValidationError

from serve_app.openai_api.messages import Message, ResponseFormat, Tool, ToolChoice, check_tool_results

CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def refusal(kind: Any, value: object) -> tuple[str, str]:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(kind).validate_python(value)
    first = caught.value.errors()[0]
    return ".".join(str(part) for part in first["loc"]), first["msg"]


def test_a_reply_as_an_sdk_sends_it_back() -> None:
    message = Message.model_validate(
        {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None, "audio": None,
         "annotations": None, "function_call": None, "reasoning_content": None}
    )  # fmt: skip
    assert message.content == ""
    assert message.tool_calls[0].function.name == "add"


def test_a_parsed_reply_can_be_sent_back() -> None:
    class Answer(BaseModel):
        value: int

    call = CALL | {"function": CALL["function"] | {"parsed_arguments": {"a": 1}}}
    said = ParsedChatCompletionMessage[Answer].model_validate(
        {"role": "assistant", "content": '{"value": 3}', "parsed": {"value": 3}, "tool_calls": [call]}
    )
    assert Message.model_validate(said.model_dump(exclude_unset=True, mode="json")).content == '{"value": 3}'


def test_parts_are_joined_for_every_role() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}]
    user = Message.model_validate({"role": "user", "content": parts})
    assert (user.content, user.parts) == ("a\nb", ("a", "b"))
    assert Message.model_validate({"role": "tool", "content": parts, "tool_call_id": "x"}).content == "a\nb"
    assert pickle.loads(pickle.dumps(user)).parts == ("a", "b")
    assert Message(role="user", content="a").parts == ("a",)


@pytest.mark.parametrize(
    "field",
    [
        {"annotations": [{"type": "url_citation", "url_citation": {"url": "u"}}]},
        {"provider_specific_fields": {"citations": None}},
        {"parsed": {"value": 3}},
        {"audio": None, "function_call": None, "refusal": None, "tool_calls": []},
        {"cache_control": {"type": "ephemeral"}},
        {"thinking_blocks": [{"type": "thinking", "thinking": "Hm."}], "reasoning_details": [{}]},
        {"stop_reason": None, "token_ids": [1, 2], "prefix": False},
    ],
)
def test_what_other_servers_say_of_an_answer_is_left_out(field: dict[str, object]) -> None:
    assert Message.model_validate({"role": "assistant", "content": "3", **field}) == Message(
        role="assistant", content="3"
    )


def test_both_spellings_of_thoughts() -> None:
    for name in ("reasoning", "reasoning_content"):
        assert Message.model_validate({"role": "assistant", "content": "3", name: "Hm."}).reasoning_content == "Hm."


def test_a_refusal_is_what_the_assistant_said() -> None:
    part = {"type": "refusal", "refusal": "I will not."}
    for body in ({"content": None, "refusal": "I will not."}, {"content": [part]}):
        assert Message.model_validate({"role": "assistant", **body}).content == "I will not."
    assert Message.model_validate({"role": "assistant", "content": "No.", "refusal": "Never."}).parts == (
        "No.",
        "Never.",
    )


def test_a_tool_and_an_assistant_may_say_nothing() -> None:
    for message in ({"role": "assistant"}, {"role": "tool", "tool_call_id": "x"}):
        assert Message.model_validate({**message, "content": None}).content == ""


@pytest.mark.parametrize("role", ["system", "developer", "user"])
def test_what_goes_beside_a_message_is_left_out_and_content_is_not(role: str) -> None:
    said = {"role": role, "content": "hi", "cache_control": {"type": "ephemeral"}, "id": "msg_1", "tool_calls": []}
    assert Message.model_validate(said) == Message.model_validate({"role": role, "content": "hi"})
    assert refusal(Message, {"role": role, "content": "hi", "images": ["data:"]})[0] == "images"


def test_functions_are_the_tools_of_old() -> None:
    called = Message.model_validate(
        {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}}
    )
    result = Message.model_validate({"role": "function", "name": "add", "content": "3"})
    assert (called.tool_calls[0].function.name, result.role, result.content) == ("add", "tool", "3")
    check_tool_results([called, result])
    with pytest.raises(ValueError, match=r"messages.1.tool_call_id: 'function_sub' is not a call of"):
        check_tool_results([called, Message.model_validate({"role": "function", "name": "sub", "content": "3"})])


@pytest.mark.parametrize(
    ("message", "where", "words"),
    [
        ({"role": "robot", "content": ""}, "role", "'tool'"),
        ({"role": "user"}, "", "content: required"),
        ({"role": "user", "content": None}, "", "content: required"),
        ({"role": "tool", "content": "3"}, "", "tool_call_id"),
        ({"role": "user", "content": "3", "tool_call_id": "x"}, "", "tool_call_id"),
        ({"role": "user", "content": "3", "tool_calls": [CALL]}, "", "tool_calls: allowed only in an assistant's"),
        ({"role": "assistant", "content": "3", "audio": {"id": "a"}}, "audio", "Extra"),
        ({"role": "assistant", "content": "3", "prefix": True}, "prefix", "Extra"),
        (
            {"role": "user", "content": [{"type": "text", "text": ""}, {"type": "image_url"}]},
            "content.1.type",
            "'text'",
        ),
        ({"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}, "tool_calls.0.type", "'function'"),
    ],
)
def test_bad_messages_are_named(message: dict[str, object], where: str, words: str) -> None:
    place, reason = refusal(Message, message)
    assert place == where
    assert words in reason


def test_results_answer_the_calls_before_them() -> None:
    asked = Message.model_validate({"role": "assistant", "tool_calls": [CALL, {**CALL, "id": "call_2"}]})

    def result(call: str) -> Message:
        return Message(role="tool", content="3", tool_call_id=call)

    check_tool_results([asked, result("call_2"), result("call_1")])
    with pytest.raises(ValueError, match=r"messages.1.tool_call_id: 'call_3' .* its unanswered calls: call_1, call_2"):
        check_tool_results([asked, result("call_3")])
    with pytest.raises(ValueError, match=r"messages.2.tool_call_id: 'call_1' is not a call of"):
        check_tool_results([asked, result("call_1"), result("call_1")])


def test_a_tool_without_parameters_takes_no_arguments() -> None:
    tool = Tool.model_validate({"type": "function", "function": {"name": "now", "parameters": None, "strict": None}})
    assert tool.function.parameters == {"type": "object", "properties": {}}
    assert not tool.function.strict


@pytest.mark.parametrize(
    ("kind", "value", "where", "words"),
    [
        (Tool, {"type": "function", "function": {"name": "a b"}}, "function.name", "pattern"),
        (Tool, {"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}, "function.parameters",
         '"type" must be "object"'),
        (Tool, {"type": "custom", "function": {"name": "a"}}, "type", "'function'"),
        (ToolChoice, {"type": "function", "function": {}}, "function.name", "required"),
        (ToolChoice, "maybe", "literal['none','auto','required']", "'required'"),
        (ResponseFormat, {"type": "json_schema"}, "", "json_schema is required with"),
        (ResponseFormat, {"type": "text", "json_schema": {"name": "a"}}, "", "json_schema is required with"),
        (ResponseFormat, {"type": "json_schema", "json_schema": {"name": "a", "schema": 3}}, "json_schema.schema", "dict"),
    ],
)  # fmt: skip
def test_bad_tools_and_formats_are_named(kind: Any, value: object, where: str, words: str) -> None:
    place, reason = refusal(kind, value)
    assert place == where
    assert words in reason


def test_the_three_formats_and_the_four_choices() -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}, "strict": True}}
    given = ResponseFormat.model_validate(schema).json_schema
    assert given is not None
    assert (given.schema_, given.strict) == ({"type": "object"}, True)
    assert ResponseFormat.model_validate({"type": "text", "json_schema": None}).type == "text"
    choices = TypeAdapter[Any](ToolChoice)
    assert [choices.validate_python(word) for word in ("none", "auto", "required")] == ["none", "auto", "required"]
    assert choices.validate_python({"type": "function", "function": {"name": "f"}}).function.name == "f"
