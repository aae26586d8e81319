"""openai-agents, unmodified: its default, the Responses API, and chat completions."""

from typing import Any

import pytest
from agents import (
    Agent,
    AsyncOpenAI,
    Model,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)

from tests.clients.asked import MODEL, QUESTION, SUM, Answer, keep, stored
from tests.conftest import Server

pytestmark = [pytest.mark.integration, pytest.mark.rotating]
KEEP: dict[str, Any] = {"temperature": 0, "max_tokens": 60, "extra_body": keep("openai-agents")}
set_tracing_disabled(True)


@function_tool
def weather(city: str) -> str:
    """Look up the weather of a city."""
    return f"snow in {city}"


@pytest.fixture(params=[OpenAIResponsesModel, OpenAIChatCompletionsModel])
def model(server: Server, request: pytest.FixtureRequest) -> Model:
    made: Model = request.param(MODEL, AsyncOpenAI(base_url=server.base_url, api_key="none", max_retries=0))
    return made


async def test_streams_with_activations(model: Model, server: Server) -> None:
    before = stored(server.store, "openai-agents")
    agent = Agent(name="a", instructions="Be brief.", model=model, model_settings=ModelSettings(**KEEP))
    whole = (await Runner.run(agent, QUESTION)).final_output
    streamed = Runner.run_streamed(agent, QUESTION)
    deltas = [
        event.data.delta
        async for event in streamed.stream_events()
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    ]
    assert whole
    assert "".join(deltas) == streamed.final_output == whole
    assert stored(server.store, "openai-agents") - before >= 2


async def test_a_tool_is_called_and_its_result_read(model: Model) -> None:
    settings = ModelSettings(**KEEP, tool_choice="required", parallel_tool_calls=False)
    agent = Agent(
        name="a", model=model, tools=[weather], model_settings=settings, tool_use_behavior="stop_on_first_tool"
    )
    done = await Runner.run(agent, QUESTION)
    assert str(done.final_output).startswith("snow in ")
    # The whole history goes back, as the SDK writes it.
    plain = Agent(name="b", model=model, model_settings=ModelSettings(**KEEP))
    again = await Runner.run(plain, [*done.to_input_list(), {"role": "user", "content": "Thanks."}])
    assert again.final_output


async def test_a_typed_answer_beside_tools(model: Model) -> None:
    agent = Agent(name="a", model=model, tools=[weather], output_type=Answer, model_settings=ModelSettings(**KEEP))
    assert isinstance((await Runner.run(agent, SUM)).final_output, Answer)
