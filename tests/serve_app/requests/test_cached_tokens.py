"""What `usage` says of tokens that came from the prefix cache: known when all choices have ended, each prompt counted once."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from serve_app.config import ServerConfig
from serve_app.engines.protocol import Engine, Finished
from serve_app.engines.storage import Done, Storage
from serve_app.openai_api.chat import ChatReply, ChatRequest
from serve_app.openai_api.completions import CompletionReply, CompletionRequest
from serve_app.openai_api.responses.request import ResponsesRequest
from serve_app.requests.generation import Served
from serve_app.requests.planning import plan_chat, plan_completion, plan_response
from tests.serve_app import tiny

COUNTED = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
MESSAGES = [{"role": "user", "content": "ab"}]


def served() -> Served:
    stand_in = cast(Engine, SimpleNamespace(name="transformers", max_model_len=128))
    return Served(cast(Any, tiny.loaded("llama")), stand_in, cast(Storage, None))


def done(cached: int) -> Done:
    return Done(Finished("a", [5], [], "length", None, cached_tokens=cached), None)


def test_a_stream_says_it_when_all_choices_have_ended() -> None:
    request = ChatRequest.model_validate({"model": "m", "messages": MESSAGES, "n": 2, **COUNTED})
    reply = plan_chat(served(), request, ServerConfig()).reply
    assert isinstance(reply, ChatReply)
    assert [chunk["usage"]["prompt_tokens_details"] for chunk in reply.opening()] == [None, None]
    first, last = reply.done(1, done(32))[-1], reply.done(0, done(0))[-1]
    assert first["usage"]["prompt_tokens_details"] is None
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}  # one of the choices has read them
    assert reply.closing({})[0]["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


def test_prompts_are_added_up() -> None:
    request = CompletionRequest.model_validate({"model": "m", "prompt": ["abc", "abd"], "n": 2})
    reply = plan_completion(served(), request, ServerConfig()).reply
    assert isinstance(reply, CompletionReply)
    whole = reply.whole([done(32), done(48), done(16), done(16)], {})
    assert whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 48}


def test_a_response_says_it_too() -> None:
    plan = plan_response(served(), ResponsesRequest.model_validate({"model": "m", "input": "ab"}), ServerConfig())
    reply = cast(Any, plan.reply).whole([done(32)], {})
    assert reply["usage"]["input_tokens_details"]["cached_tokens"] == 32


@pytest.mark.parametrize("route", ["chat", "completions", "responses"])
def test_a_salt_reaches_the_job(route: str) -> None:
    body = {"model": "m", "cache_salt": "tenant"}
    plan = {
        "chat": lambda: plan_chat(served(), ChatRequest(**body, messages=cast(Any, MESSAGES)), ServerConfig()),
        "completions": lambda: plan_completion(served(), CompletionRequest(**body, prompt="ab"), ServerConfig()),
        "responses": lambda: plan_response(served(), ResponsesRequest(**body, input="ab"), ServerConfig()),
    }[route]()
    assert [choice.cache_salt for choice in plan.choices] == ["tenant"]
    with pytest.raises(ValueError, match="cache_salt"):
        CompletionRequest.model_validate({**body, "prompt": "ab", "cache_salt": ""})
