"""langchain-openai, unmodified, over chat completions and over the Responses API."""

import pytest
from langchain_openai import ChatOpenAI

from tests.clients.asked import MODEL, QUESTION, SUM, Answer, Weather, keep, stored
from tests.conftest import Server

pytestmark = [pytest.mark.integration, pytest.mark.rotating]


@pytest.fixture(params=[False, True], ids=["chat", "responses"])
def chat(server: Server, request: pytest.FixtureRequest) -> ChatOpenAI:
    return ChatOpenAI(
        model=MODEL, base_url=server.base_url, api_key="none", temperature=0, max_completion_tokens=60,
        extra_body=keep("langchain"), use_responses_api=request.param, max_retries=0,
    )  # fmt: skip


def test_streams_with_activations(chat: ChatOpenAI, server: Server) -> None:
    before = stored(server.store, "langchain")
    whole = chat.invoke(QUESTION)
    assert whole.text
    assert "".join(piece.text for piece in chat.stream(QUESTION)) == whole.text
    assert stored(server.store, "langchain") - before >= 2


def test_tools_and_their_results(chat: ChatOpenAI) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage

    called = chat.bind_tools([Weather], tool_choice="required", parallel_tool_calls=False).invoke(QUESTION)
    (call,) = called.tool_calls
    Weather.model_validate(call["args"])
    history = [HumanMessage(QUESTION), called, ToolMessage("snow", tool_call_id=call["id"])]
    assert chat.bind_tools([Weather], tool_choice="none").invoke(history).text


def test_a_typed_answer(chat: ChatOpenAI) -> None:
    assert isinstance(chat.with_structured_output(Answer).invoke(SUM), Answer)
    assert isinstance(chat.with_structured_output(Answer, method="function_calling").invoke(SUM), Answer)
