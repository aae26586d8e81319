"""pydantic-ai, unmodified: agents over chat completions and over the Responses API."""

from typing import Any

import pytest
from pydantic_ai import Agent, ModelRequest, NativeOutput, ToolOutput, UserPromptPart
from pydantic_ai.direct import model_request
from pydantic_ai.messages import ToolCallPart
from pydantic_ai.models import Model, ModelRequestParameters
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.tools import ToolDefinition

from tests.clients.asked import MODEL, QUESTION, SUM, Answer, Weather, keep, stored
from tests.conftest import Server

pytestmark = [pytest.mark.integration, pytest.mark.rotating]
SETTINGS: Any = {"temperature": 0, "max_tokens": 60, "extra_body": keep("pydantic-ai"), "parallel_tool_calls": False}


@pytest.fixture(params=[OpenAIChatModel, OpenAIResponsesModel])
def model(server: Server, request: pytest.FixtureRequest) -> Model:
    made: Model = request.param(MODEL, provider=OpenAIProvider(base_url=server.base_url, api_key="none"))
    return made


async def test_streams_with_activations(model: Model, server: Server) -> None:
    before = stored(server.store, "pydantic-ai")
    agent = Agent(model, model_settings=SETTINGS, instructions="Be brief.")
    whole = (await agent.run(QUESTION)).output
    async with agent.run_stream(QUESTION) as streamed:
        pieces = [piece async for piece in streamed.stream_text(delta=True, debounce_by=None)]
    assert "".join(pieces) == whole
    assert len(pieces) > 1
    assert stored(server.store, "pydantic-ai") - before >= 2


@pytest.mark.parametrize("output", [NativeOutput, ToolOutput])
async def test_typed_answers(model: Model, output: Any) -> None:
    agent = Agent(model, output_type=output(Answer), model_settings=SETTINGS, retries=0)
    assert isinstance((await agent.run(SUM)).output, Answer)


async def test_a_tool_is_called(model: Model) -> None:
    tool = ToolDefinition(name="weather", parameters_json_schema=Weather.model_json_schema())
    parameters = ModelRequestParameters(function_tools=[tool], allow_text_output=False)
    asked = ModelRequest(parts=[UserPromptPart(QUESTION)])
    reply = await model_request(model, [asked], model_settings=SETTINGS, model_request_parameters=parameters)
    (call,) = [part for part in reply.parts if isinstance(part, ToolCallPart)]
    Weather.model_validate(call.args_as_dict())


async def test_an_agent_with_a_tool_and_a_typed_answer(model: Model) -> None:
    """Every turn has the tools, and the answer's schema beside them."""
    agent = Agent(model, output_type=NativeOutput(Answer), model_settings=SETTINGS, retries=0)

    @agent.tool_plain
    def weather(city: str) -> str:
        return "snow"

    assert isinstance((await agent.run(SUM)).output, Answer)
