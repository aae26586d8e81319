"""What a request for a response may say: the chat request that it becomes, and what is refused by which name."""

import pickle
from typing import Any

import pytest
from pydantic import ValidationError

from serve_app.openai_api.chat import ChatRequest
from serve_app.openai_api.errors import ApiError, from_validation
from serve_app.openai_api.responses.request import LOGPROBS, ResponsesRequest

ADD = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
TOOLS = [{"type": "function", **ADD}]
CALL = {"type": "function_call", "call_id": "c1", "name": "add", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "3"}


def response(**body: Any) -> ResponsesRequest:
    return ResponsesRequest.model_validate({"model": "m", "input": "hi", **body})


def refusal(**body: Any) -> ApiError:
    with pytest.raises(ValidationError) as caught:
        response(**body)
    return from_validation(list(caught.value.errors()))


def test_it_becomes_the_chat_request_that_a_client_would_write() -> None:
    asked = response(
        instructions="Be brief.", max_output_tokens=9, temperature=0.5, seed=3, stop="x", include=[LOGPROBS], top_logprobs=2,
        tools=TOOLS, tool_choice={"type": "function", "name": "add"}, parallel_tool_calls=False, stream=True,
        activations={"session_id": "s", "layers": [1], "return": "sample"}, metadata={"a": "b"},
        text={"format": {"type": "text"}},
    )  # fmt: skip
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    chat = ChatRequest.model_validate(
        {
            "model": "m", "messages": messages, "max_completion_tokens": 9, "temperature": 0.5, "seed": 3, "stop": ["x"],
            "logprobs": True, "top_logprobs": 2, "tools": [{"type": "function", "function": ADD}],
            "tool_choice": {"type": "function", "function": {"name": "add"}}, "parallel_tool_calls": False, "stream": True,
            "activations": {"session_id": "s", "layers": [1], "return": "sample"}, "metadata": {"a": "b"},
            "response_format": {"type": "text"},
        }
    )  # fmt: skip
    assert asked.chat == chat
    assert pickle.loads(pickle.dumps(asked)).chat == chat  # it goes to a replica


def test_schemas_are_the_chats() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    asked = response(text={"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}})
    shape = asked.chat.response_format
    assert shape is not None
    assert shape.json_schema is not None
    assert (shape.json_schema.name, shape.json_schema.schema_, shape.json_schema.strict) == ("n", schema, True)
    assert response(text={"format": {"type": "json_object"}}).chat.response_format is not None


def test_items_of_one_turn_are_one_message() -> None:
    thoughts = {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "Hm."}],
    }
    words = {"type": "output_text", "text": "I add.", "annotations": [], "logprobs": []}
    said = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [words]}
    other = {**CALL, "id": "fc_1", "call_id": "c2", "status": "completed"}
    asked = response(
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "Add."}]}, thoughts, said, CALL, other,
            {**RESULT, "call_id": "c2"}, {**RESULT, "output": [{"type": "input_text", "text": "4"}]},
            CALL, RESULT, {"role": "assistant", "content": "So it is."}, {"role": "user", "content": "Thanks."},
        ]
    )  # fmt: skip
    messages = asked.chat.messages
    assert [message.role for message in messages] == [
        "user", "assistant", "tool", "tool", "assistant", "tool", "assistant", "user"
    ]  # fmt: skip
    assert [message.content for message in messages] == ["Add.", "I add.", "3", "4", "", "3", "So it is.", "Thanks."]
    assert [[call.id for call in message.tool_calls] for message in messages if message.tool_calls] == [
        ["c1", "c2"],
        ["c1"],
    ]
    assert [message.reasoning_content for message in messages if message.role == "assistant"] == ["Hm.", None, None]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "the server stores no conversations"),
        ({"conversation": "conv_1"}, "conversation", "the server stores no conversations"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "the server stores no conversations"),
        ({"background": True}, "background", "only false"),
        ({"store": True}, "store", "only false"),
        ({"input": []}, "input", "at least 1"),
        ({"input": [{"type": "reasoning"}], "instructions": "x"}, "input", "no message"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0", "send the item itself"),
        ({"input": [{"id": "msg_1"}]}, "input.0", "send the item itself"),
        ({"input": [{"type": "mcp_call"}]}, "input.0", "'mcp_call'"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role", "'developer'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.type", "input_text"),
        ({"input": [{"role": "user", "content": "x", "made_up": 1}]}, "input.0.made_up", "not supported"),
        ({"input": [RESULT], "instructions": "x"}, "input.0.call_id", "is not a call of"),
        ({"input": [{"role": "user", "content": "x"}, CALL, RESULT, RESULT]}, "input.3.call_id", "is not a call of"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "function"),
        ({"tools": [{**TOOLS[0], "parameters": {"type": "string"}}]}, "tools.0.parameters", "must be"),
        ({"tool_choice": {"type": "function", "name": "add"}}, "tool_choice", "requires tools"),
        ({"tool_choice": {"type": "mcp", "name": "add"}}, "tool_choice.type", "function"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format", "requires name and schema"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "medium"),
        ({"top_logprobs": 2}, "top_logprobs", "only with include"),
        ({"include": ["nothing"]}, "include.0", "Input should be"),
        ({"n": 2}, "n", "less than or equal to 1"),
        ({"max_tokens": 2}, "max_tokens", "not supported"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"made_up": 1}, "made_up", "not supported"),
    ],
)  # fmt: skip
def test_what_is_refused_is_named_as_it_was_sent(body: dict[str, Any], param: str, words: str) -> None:
    error = refusal(**body)
    assert (error.status, error.param) == (400, param)
    assert words in error.message


@pytest.mark.parametrize(
    ("param", "here"),
    [
        ("messages", "input"), ("messages.1.content", "input.0.content"), ("messages.0", "instructions"),
        ("max_completion_tokens", "max_output_tokens"), ("response_format.json_schema.schema", "text.format.schema"),
        ("tools.0.function.parameters", "tools.0.parameters"), ("temperature", "temperature"),
    ],
)  # fmt: skip
def test_errors_of_the_chat_are_named_as_here(param: str, here: str) -> None:
    error = response(instructions="x").renamed(ApiError(400, f"{param}: is wrong", param=param, code="c"))
    assert (error.param, error.message, error.code) == (here, f"{here}: is wrong", "c")
