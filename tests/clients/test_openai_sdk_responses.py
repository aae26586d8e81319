"""The openai SDK on the Responses API: created, streamed, parsed, with tools, and a history of its own objects."""

from typing import Any

import openai
import pytest
from openai import OpenAI, pydantic_function_tool
from openai.types.responses import FunctionToolParam

from tests.clients.asked import KEY, MODEL, QUESTION, SUM, Answer, Weather, keep
from tests.conftest import Server

pytestmark = [pytest.mark.integration, pytest.mark.rotating]
ASK: dict[str, Any] = {"model": MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": 60}
KEEP = keep("responses")
TOOL: FunctionToolParam = {
    "type": "function", "name": "weather", "parameters": Weather.model_json_schema(), "strict": True
}  # fmt: skip


def test_created_streamed_and_as_a_chat_the_text_is_the_same(client: OpenAI) -> None:
    whole = client.responses.create(**ASK, instructions="Be brief.", extra_body=KEEP)
    with client.responses.stream(**ASK, instructions="Be brief.", extra_body=KEEP) as stream:
        events = list(stream)
        final = stream.get_final_response()
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    chat = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, stop=".")
    assert whole.output_text
    assert whole.output_text == final.output_text == chat.choices[0].message.content
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == final.output_text
    assert whole.usage is not None
    assert chat.usage is not None
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (
        chat.usage.prompt_tokens, chat.usage.completion_tokens
    )  # fmt: skip
    assert KEY in whole.activations["tensors"]
    assert KEY in final.activations["tensors"]


def test_logprobs(client: OpenAI) -> None:
    reply = client.responses.create(**ASK, include=["message.output_text.logprobs"], top_logprobs=2)
    (part,) = reply.output[0].content
    assert "".join(token.token for token in part.logprobs) == reply.output_text


def test_a_call_its_result_and_the_answer(client: OpenAI) -> None:
    """The SDK's own items go back as they came, followed by the tool's result."""
    ask = {**ASK, "tools": [TOOL], "parallel_tool_calls": False}
    called = client.responses.create(**ask, tool_choice="required", extra_body=KEEP)
    (call,) = called.output
    assert call.type == "function_call"
    Weather.model_validate_json(call.arguments)
    with client.responses.stream(**ask, tool_choice={"type": "function", "name": "weather"}) as stream:
        kinds = {event.type for event in stream}
        (streamed,) = stream.get_final_response().output
    assert "response.function_call_arguments.delta" in kinds
    assert (streamed.name, streamed.arguments) == (call.name, call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "snow"}
    history = [{"role": "user", "content": QUESTION}, *called.output, result]
    answer = client.responses.create(**{**ask, "input": history}, tool_choice="none", extra_body=KEEP)
    assert answer.output_text
    again = [*history, *answer.output, {"role": "user", "content": "Thanks."}]
    assert client.responses.create(**{**ask, "input": again}, tool_choice="none").output_text


def test_parsed_into_pydantic_models(client: OpenAI) -> None:
    reply = client.responses.parse(**{**ASK, "input": SUM}, text_format=Answer, extra_body=KEEP)
    assert isinstance(reply.output_parsed, Answer)
    tool = pydantic_function_tool(Weather)["function"]
    offered: Any = {"type": "function", **tool}
    called = client.responses.parse(**ASK, tools=[offered], tool_choice="required", parallel_tool_calls=False)
    assert called.output[0].type == "function_call"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("extra", "kind", "param"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "model"),
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"max_output_tokens": 9000}, openai.BadRequestError, "input"),
        ({"previous_response_id": "resp_1"}, openai.BadRequestError, "previous_response_id"),
        ({"store": True}, openai.BadRequestError, "store"),
    ],
)
def test_errors_name_the_parameter(
    client: OpenAI, server: Server, extra: dict[str, Any], kind: type[openai.APIStatusError], param: str, stream: bool
) -> None:
    with pytest.raises(kind) as caught:
        client.responses.create(**{**ASK, **extra}, stream=stream)
    assert caught.value.param == param
