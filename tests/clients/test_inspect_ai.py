"""inspect_ai, unmodified, through its openai-compatible provider: a GSM8K-shaped task whose activations are kept."""

import pytest
from inspect_ai.log import list_eval_logs, read_eval_log
from inspect_ai.model import ChatMessage, ChatMessageTool, ChatMessageUser, GenerateConfig, ResponseSchema, get_model
from inspect_ai.tool import ToolInfo, ToolParams
from inspect_ai.util import json_schema

from roentgen.store import Session
from tests.clients.asked import MODEL, QUESTION, SUM, Answer, Weather, keep, stored
from tests.clients.conftest import Documentation
from tests.conftest import Server

pytestmark = pytest.mark.integration


def test_gsm8k_runs_scores_and_keeps_activations(docs: Documentation, server: Server) -> None:
    docs.run("inspect")
    (found,) = list_eval_logs(str(docs.folder / "logs"))
    log = read_eval_log(found)
    assert log.status == "success"
    assert log.samples is not None
    assert len(log.samples) == 4
    for sample in log.samples:
        assert sample.error is None
        assert sample.scores is not None
        assert sample.scores["match"].value in ("C", "I")
        assert sample.output.completion
        assert sample.output.usage is not None
        assert sample.output.usage.output_tokens > 0
        assert sample.output.stop_reason in ("stop", "max_tokens")
    assert log.results is not None
    assert log.results.scores[0].metrics["accuracy"].value in (0, 0.25, 0.5, 0.75, 1)
    rollouts = Session.open(str(server.store / "inspect")).rollouts()
    assert len(rollouts) == 4
    for sample in log.samples:  # samples run at once, so they are stored in any order
        assert sum(str(sample.input) in text for text in rollouts["text"]) == 1


@pytest.mark.rotating
@pytest.mark.parametrize(
    "options", [{}, {"stream": True}, {"responses_api": True}], ids=["chat", "stream", "responses"]
)
async def test_tools_typed_answers_and_a_prompt_that_is_too_long(server: Server, options: dict[str, bool]) -> None:
    session = "-".join(["inspect", *options])
    config = GenerateConfig(temperature=0, max_tokens=60, extra_body=keep(session), parallel_tool_calls=False)
    model = get_model(
        f"openai-api/roentgen/{MODEL}",
        base_url=server.base_url,
        api_key="none",
        config=config,
        memoize=False,
        **options,
    )
    weather = ToolInfo(name="weather", description="Look it up.", parameters=ToolParams(**Weather.model_json_schema()))
    called = (await model.generate(QUESTION, tools=[weather], tool_choice="any")).message
    assert called.tool_calls
    Weather.model_validate(called.tool_calls[0].arguments)
    result = ChatMessageTool(content="snow", tool_call_id=called.tool_calls[0].id, function="weather")
    history: list[ChatMessage] = [ChatMessageUser(content=QUESTION), called, result]
    assert (await model.generate(history, tools=[weather], tool_choice="none")).completion
    shape = ResponseSchema(name="answer", json_schema=json_schema(Answer))
    typed = await model.generate(SUM, config=GenerateConfig(response_schema=shape))
    Answer.model_validate_json(typed.completion)
    assert (await model.generate(str([*range(9000)]))).stop_reason == "model_length"
    # For the Responses API, inspect_ai sends fields of its own list only, and no other of `extra_body`.
    if "responses_api" not in options:
        assert stored(server.store, session) == 3
