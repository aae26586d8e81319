"""The openai SDK's helpers for tools and for replies of a given shape: what comes back is what the pydantic model allows."""

import json
from typing import Any, Literal

import pytest
from openai import OpenAI, pydantic_function_tool
from pydantic import BaseModel, Field

from tests.clients.test_openai_sdk import KEEP, KEY, MODEL

pytestmark = pytest.mark.integration


class Weather(BaseModel):
    """Look up the weather of a city."""

    city: Literal["Paris", "Oslo", "Rome"]
    days: int = Field(ge=1, le=9)


class Clock(BaseModel):
    """Tell the time in a city."""

    city: Literal["Paris", "Oslo", "Rome"]


class Answer(BaseModel):
    reasoning: str = Field(max_length=60)
    number: int = Field(ge=0, le=99)
    sure: bool


TOOLS = [pydantic_function_tool(Weather), pydantic_function_tool(Clock)]
NAMED = {"type": "function", "function": {"name": "Clock"}}
ASK: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "How is the weather in Oslo for the next 3 days?"}],
    "max_tokens": 120,
    "temperature": 0,
}
SUM: dict[str, Any] = {**ASK, "messages": [{"role": "user", "content": "What is 2 + 3? Answer in JSON."}]}


@pytest.mark.parametrize(("choice", "models"), [("required", (Weather, Clock)), (NAMED, (Clock,))])
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_forced_calls_are_valid(client: OpenAI, choice: Any, models: tuple[type, ...], temperature: float) -> None:
    ask = {
        **ASK,
        "temperature": temperature,
        "seed": 1,
        "tools": TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": False,
    }
    (reply,) = client.chat.completions.create(**ask).choices
    assert reply.finish_reason == "tool_calls"
    assert reply.message.tool_calls
    for call in reply.message.tool_calls:
        (model,) = [model for model in models if model.__name__ == call.function.name]
        model.model_validate_json(call.function.arguments)


def test_parse_gives_the_called_tools_pydantic_objects(client: OpenAI) -> None:
    reply = client.chat.completions.parse(**ASK, tools=TOOLS, tool_choice="required", extra_body=KEEP)
    calls = reply.choices[0].message.tool_calls
    assert calls
    assert all(isinstance(call.function.parsed_arguments, Weather | Clock) for call in calls)
    assert reply.activations["tensors"][KEY]["shape"][0] == reply.usage.total_tokens - 1


def test_streamed_calls_are_put_together_by_the_sdk(client: OpenAI) -> None:
    whole = client.chat.completions.create(**ASK, tools=TOOLS, tool_choice="required")
    with client.chat.completions.stream(**ASK, tools=TOOLS, tool_choice="required", extra_body=KEEP) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    said = [(c.function.name, c.function.arguments) for c in whole.choices[0].message.tool_calls or []]
    assert [(c.function.name, c.function.arguments) for c in final.choices[0].message.tool_calls or []] == said
    assert all(call.function.parsed_arguments for call in final.choices[0].message.tool_calls or [])
    kinds = [event.type for event in events]
    assert "tool_calls.function.arguments.delta" in kinds
    assert "tool_calls.function.arguments.done" in kinds
    last = [event for event in events if event.type == "chunk"][-1].chunk
    assert KEY in last.activations["tensors"]


def test_a_call_its_result_and_the_answer(client: OpenAI) -> None:
    """The SDK's own message object goes back as it came, followed by the tool's result."""
    called = client.chat.completions.parse(**ASK, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    message = called.choices[0].message
    assert message.tool_calls
    (call,) = message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": json.dumps({"forecast": "snow"})}
    history = {**ASK, "messages": [*ASK["messages"], message, result], "max_tokens": 40}
    answer = client.chat.completions.create(**history, tools=TOOLS, tool_choice="none", extra_body=KEEP)
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert KEY in answer.activations["tensors"]
    auto = client.chat.completions.create(**history, tools=TOOLS)
    assert auto.usage is not None
    assert called.usage is not None
    assert auto.usage.prompt_tokens > called.usage.total_tokens - 5  # it read the tools, the call and its result
    assert auto.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_a_reply_parsed_into_a_pydantic_model(client: OpenAI) -> None:
    reply = client.chat.completions.parse(**SUM, response_format=Answer, extra_body=KEEP)
    parsed = reply.choices[0].message.parsed
    assert isinstance(parsed, Answer)
    assert KEY in reply.activations["tensors"]
    with client.chat.completions.stream(**SUM, response_format=Answer, extra_body=KEEP) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == parsed
    assert "content.done" in [event.type for event in events]
    assert KEY in [event for event in events if event.type == "chunk"][-1].chunk.activations["tensors"]
    # What went out of the SDK goes back in.
    again = [*SUM["messages"], reply.choices[0].message, {"role": "user", "content": "And 4 + 4?"}]
    assert client.chat.completions.parse(**{**SUM, "messages": again}, response_format=Answer).choices[0].message.parsed


def test_json_objects(client: OpenAI) -> None:
    for seed in range(3):
        ask = {**SUM, "temperature": 1.2, "seed": seed, "max_tokens": 300, "response_format": {"type": "json_object"}}
        (choice,) = client.chat.completions.create(**ask).choices
        assert (choice.message.content or "").lstrip().startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content or ""), dict)


def test_json_schemas(client: OpenAI) -> None:
    schema = {"type": "object", "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 9}}}
    schema |= {"required": ["sum"], "additionalProperties": False}
    given = {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema, "strict": True}}
    reply = client.chat.completions.create(**{**SUM, "temperature": 1.5}, n=4, response_format=given, logprobs=True)
    for choice in reply.choices:
        assert choice.finish_reason == "stop"
        assert 0 <= json.loads(choice.message.content or "")["sum"] <= 9
        assert choice.logprobs is not None
