"""instructor, unmodified: typed answers by tools, by JSON schemas, and piece by piece."""

from typing import Any

import instructor
import pytest
from openai import OpenAI

from tests.clients.asked import MODEL, SUM, Answer, keep, stored
from tests.conftest import Server

pytestmark = [pytest.mark.integration, pytest.mark.rotating]
ASK: dict[str, Any] = {
    "model": MODEL, "messages": [{"role": "user", "content": SUM}], "temperature": 0, "max_tokens": 60,
    "max_retries": 0, "extra_body": keep("instructor"),
}  # fmt: skip


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA])
def test_typed_answers_whole_and_streamed(client: OpenAI, server: Server, mode: instructor.Mode) -> None:
    before = stored(server.store, "instructor")
    asking = instructor.from_openai(client, mode=mode)
    answer, completion = asking.chat.completions.create_with_completion(**ASK, response_model=Answer)
    assert isinstance(answer, Answer)
    assert completion.activations["session_id"] == "instructor"
    *_, last = asking.chat.completions.create_partial(**ASK, response_model=Answer)
    assert last.model_dump() == answer.model_dump()
    assert stored(server.store, "instructor") - before >= 2


def test_responses(client: OpenAI) -> None:
    asking = instructor.from_openai(client, mode=instructor.Mode.RESPONSES_TOOLS)
    ask = {**ASK, "input": SUM, "max_output_tokens": 60}
    for chats in ("messages", "max_tokens"):
        del ask[chats]
    assert isinstance(asking.responses.create(**ask, response_model=Answer), Answer)
