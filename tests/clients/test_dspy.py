"""dspy, unmodified: typed predictions, native tool calls, and a stream."""

from typing import Any

import dspy
import litellm
import pytest

from tests.clients.asked import MODEL, QUESTION, SUM, Answer, keep, stored
from tests.conftest import Server

pytestmark = [pytest.mark.integration, pytest.mark.rotating]

# dspy asks litellm what a model can do, which knows only those that it lists.
CAN = {
    "litellm_provider": "openai",
    "mode": "chat",
    "supports_function_calling": True,
    "supports_response_schema": True,
}
litellm.register_model({f"openai/{MODEL}": CAN, MODEL: CAN})


class Sum(dspy.Signature):
    """Add."""

    question: str = dspy.InputField()
    answer: Answer = dspy.OutputField()


class Act(dspy.Signature):
    """Look it up."""

    question: str = dspy.InputField()
    tools: list[dspy.Tool] = dspy.InputField()
    outputs: dspy.ToolCalls = dspy.OutputField()


def weather(city: str) -> str:
    """Look up the weather of a city."""
    return f"snow in {city}"


def model(server: Server, **options: Any) -> dspy.LM:
    shared = {"temperature": 0, "max_tokens": 60, "cache": False, "num_retries": 0, "extra_body": keep("dspy")}
    return dspy.LM(f"openai/{MODEL}", engine="litellm", api_base=server.base_url, api_key="none", **shared, **options)


@pytest.mark.parametrize("kind", ["chat", "responses"])
def test_a_typed_answer(server: Server, kind: str) -> None:
    before = stored(server.store, "dspy")
    with dspy.context(lm=model(server, model_type=kind), adapter=dspy.JSONAdapter()):
        assert isinstance(dspy.Predict(Sum)(question=SUM).answer, Answer)
    assert stored(server.store, "dspy") - before >= 1


def test_tools_are_called(server: Server) -> None:
    adapter = dspy.ChatAdapter(use_native_function_calling=True)
    with dspy.context(lm=model(server, tool_choice="required", parallel_tool_calls=False), adapter=adapter):
        (call,) = dspy.Predict(Act)(question=QUESTION, tools=[dspy.Tool(weather)]).outputs.tool_calls
    assert (call.name, [*call.args]) == ("weather", ["city"])


async def test_a_stream(server: Server) -> None:
    with dspy.context(lm=model(server), adapter=dspy.JSONAdapter()):
        *pieces, last = [piece async for piece in dspy.streamify(dspy.Predict(Sum))(question=SUM)]
    assert len(pieces) > 2
    assert isinstance(last.answer, Answer)
