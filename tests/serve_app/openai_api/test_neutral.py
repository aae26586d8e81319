"""Parameters that change nothing: what is true here passes on every route that has them, and nothing else does."""

from typing import Any

import pytest
from pydantic import ValidationError

from serve_app.openai_api.chat import ChatRequest
from serve_app.openai_api.completions import CompletionRequest
from serve_app.openai_api.errors import ApiError, from_validation
from serve_app.openai_api.neutral import NeutralChatParams, NeutralCompletionParams, NeutralParams, Only

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
TEXT: dict[str, Any] = {"model": "m", "prompt": "hello"}
ROUTES: list[tuple[Any, dict[str, Any], Any]] = [
    (ChatRequest, CHAT, NeutralParams),
    (ChatRequest, CHAT, NeutralChatParams),
    (CompletionRequest, TEXT, NeutralParams),
    (CompletionRequest, TEXT, NeutralCompletionParams),
]
SETTINGS = [
    (request, body, name, only)
    for request, body, table in ROUTES
    for name, field in table.model_fields.items()
    for only in field.metadata
    if isinstance(only, Only)
]
OTHERS: list[Any] = ["flex", "", 0, 1, 2, 0.5, True, False, [], [1], ["audio"], {}, {"a": 1}]


def refusal(request: Any, body: dict[str, Any]) -> ApiError:
    with pytest.raises(ValidationError) as caught:
        request.model_validate(body)
    return from_validation(list(caught.value.errors()))


@pytest.mark.parametrize(("request_", "body", "name", "only"), SETTINGS)
def test_only_what_is_true_here_is_accepted(request_: Any, body: dict[str, Any], name: str, only: Only) -> None:
    assert request_.model_fields[name].default in only.values
    schema = request_.model_json_schema()["properties"][name]
    assert schema["enum"] == list(only.values)
    for value in (*only.values, None):
        request_.model_validate({**body, name: value})
    for value in OTHERS:
        if repr(value) not in map(repr, only.values):
            error = refusal(request_, {**body, name: value})
            assert (error.status, error.param, error.code) == (400, name, "unsupported_value")
            assert error.message.startswith(f"{name}: this server supports only ")


def test_a_whole_number_may_be_spelled_as_a_float() -> None:
    CompletionRequest.model_validate({**TEXT, "length_penalty": 1.0})


def test_what_is_allowed_is_said_as_json() -> None:
    assert "supports only false (given: 'True')" in refusal(ChatRequest, {**CHAT, "store": True}).message
    assert 'only "auto" or "default"' in refusal(CompletionRequest, {**TEXT, "service_tier": "flex"}).message


@pytest.mark.parametrize(
    ("name", "value", "wrong"),
    [
        ("user", "u", 1),
        ("metadata", {"a": "b"}, {"a": 1}),
        ("prompt_cache_key", "k", 1),
        ("safety_identifier", "k", []),
        ("priority", -3, "high"),
        ("spaces_between_special_tokens", False, "no way"),
        ("stream_options", {"include_obfuscation": True}, {"include_obfuscation": 3}),
    ],
)
def test_a_hint_says_anything_of_its_type(name: str, value: Any, wrong: Any) -> None:
    for request, body in ((ChatRequest, CHAT), (CompletionRequest, TEXT)):
        request.model_validate({**body, "stream": True, name: value})
        assert refusal(request, {**body, "stream": True, name: wrong}).param.startswith(name)


def test_a_prediction_is_a_hint() -> None:
    ChatRequest.model_validate({**CHAT, "prediction": {"type": "content", "content": "x"}})
