"""litellm, unmodified, by its `openai/` provider."""

import json
from typing import Any

import litellm
import pytest

from tests.clients.asked import KEY, MODEL, QUESTION, SUM, Answer, Weather, keep, stored
from tests.conftest import Server

pytestmark = [pytest.mark.integration, pytest.mark.rotating]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": Weather.model_json_schema()}}


@pytest.fixture
def ask(server: Server) -> dict[str, Any]:
    return {
        "model": f"openai/{MODEL}", "api_base": server.base_url, "api_key": "none", "temperature": 0, "max_tokens": 60,
        "messages": [{"role": "user", "content": QUESTION}], "extra_body": keep("litellm"),
    }  # fmt: skip


def test_streams_with_activations(ask: dict[str, Any], server: Server) -> None:
    whole = litellm.completion(**ask)
    chunks = list(litellm.completion(**ask, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert KEY in whole.activations["tensors"]
    assert stored(server.store, "litellm") >= 2


def test_tools_and_their_results(ask: dict[str, Any]) -> None:
    called = litellm.completion(**ask, tools=[TOOL], tool_choice="required", parallel_tool_calls=False)
    message = called.choices[0].message
    (call,) = message.tool_calls
    Weather.model_validate_json(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": "snow"}
    history = {**ask, "messages": [*ask["messages"], message, result]}
    assert litellm.completion(**history, tools=[TOOL], tool_choice="none").choices[0].message.content


def test_a_typed_answer(ask: dict[str, Any]) -> None:
    ask["messages"] = [{"role": "user", "content": SUM}]
    for extra in ({}, {"tools": [TOOL], "tool_choice": "none"}):
        reply = litellm.completion(**ask, **extra, response_format=Answer)
        Answer.model_validate_json(reply.choices[0].message.content)


def test_responses(ask: dict[str, Any]) -> None:
    shared = {name: ask[name] for name in ("model", "api_base", "api_key", "temperature", "extra_body")}
    reply = litellm.responses(**shared, input=QUESTION, max_output_tokens=20)
    events = list(litellm.responses(**shared, input=QUESTION, max_output_tokens=20, stream=True))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == reply.output[0].content[0].text


def test_a_prompt_that_is_too_long_is_recognised(ask: dict[str, Any]) -> None:
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**{**ask, "messages": [{"role": "user", "content": json.dumps(list(range(9000)))}]})
