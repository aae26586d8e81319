import pytest
from pydantic import ValidationError

from serve_app.openai_api.chat import ChatRequest
from serve_app.openai_api.errors import ApiError, from_validation

TOOL = {"type": "function", "function": {"name": "add"}}
SUBTRACTED = {"type": "function", "function": {"name": "sub"}}
HELLO = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def refusal(**extra: object) -> ApiError:
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate({**HELLO, **extra})
    return from_validation(list(caught.value.errors()))


def test_a_plain_request() -> None:
    request = ChatRequest.model_validate({**HELLO, "stop": "x", "max_tokens": None, "temperature": 0})
    assert request.stop == ["x"]
    assert request.token_limit is None
    assert request.temperature == 0


def test_content_parts_are_joined_and_the_new_name_of_the_limit_wins() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {"model": "m", "messages": [{"role": "user", "content": parts}], "max_tokens": 3, "max_completion_tokens": 5}
    request = ChatRequest.model_validate(body)
    assert request.messages[0].content == "a\nb"
    assert request.token_limit == 5


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"audio": {}}, "audio"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"made_up": 1}, "made_up"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(extra: dict[str, object], param: str) -> None:
    error = refusal(**extra)
    assert (error.status, error.param, error.code) == (400, param, "unsupported_parameter")


@pytest.mark.parametrize(
    ("extra", "param", "words"),
    [
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 200}, "n", "128"),
        ({"top_logprobs": 3}, "top_logprobs", "only with logprobs"),
        ({"logit_bias": {"5": 200}}, "logit_bias.5", "100"),
        ({"presence_penalty": 3}, "presence_penalty", "less than or equal to 2"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only with stream"),
        ({"tool_choice": "required"}, "tool_choice", "requires tools"),
        (
            {
                "tools": [TOOL],
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "none", "tools": [TOOL]}},
            },
            "tool_choice.allowed_tools.mode",
            "'required'",
        ),
        (
            {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
            "tool_choice.allowed_tools.tools",
            "at least 1",
        ),
        (
            {
                "tools": [TOOL],
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [SUBTRACTED]}},
            },
            "tool_choice",
            "no tool named 'sub'",
        ),
        ({"activations": {}, "collect_activations": {}}, "activations", "another name for it"),
        ({"n": 2, "activations": {"key": {"config_hash": "c", "problem_id": "p"}}}, "activations.key", "n > 1"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "'assistant'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type", "text"),
        ({"stop": [""]}, "stop.0", "at least 1"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"activations": {"session_id": "a/b"}}, "activations.session_id", "not a session id"),
        ({"activations": {"positions": "some"}}, "activations.positions", "not a position policy"),
        ({"activations": {"layer": [1]}}, "activations.layer", "not supported"),
    ],
)
def test_bad_values_are_named(extra: dict[str, object], param: str, words: str) -> None:
    error = refusal(**extra)
    assert error.status == 400
    assert error.param == param
    assert words in error.message
    assert set(error.body()["error"]) == {"message", "type", "param", "code"}


def test_an_error_crosses_a_handle_as_data() -> None:
    error = ApiError(429, "busy", code="busy", retry_after_s=2)
    again = ApiError.from_payload(error.payload())
    assert again.body() == error.body()
    assert again.headers() == {"Retry-After": "2"}
    assert again.kind == "rate_limit_error"
