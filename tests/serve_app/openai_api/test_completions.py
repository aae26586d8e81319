"""What a completion request may say: above all, what is said of a prompt that cannot be read."""

from typing import Any

import pytest
from pydantic import ValidationError

from serve_app.openai_api.completions import CompletionRequest
from serve_app.openai_api.errors import ApiError, from_validation


def refusal(**body: Any) -> ApiError:
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate({"model": "m", **body})
    return from_validation(list(caught.value.errors()))


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), ("", [""]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_the_four_kinds_of_prompts(prompt: Any, prompts: list[Any]) -> None:
    assert CompletionRequest.model_validate({"model": "m", "prompt": prompt}).prompts == prompts


@pytest.mark.parametrize(
    ("prompt", "param", "reason"),
    [
        ([-1], "prompt.0", "greater than or equal to 0"),
        ([1, -5], "prompt.1", "greater than or equal to 0"),
        ([[]], "prompt.0", "at least 1 item"),
        ([[1], [-1]], "prompt.1.0", "greater than or equal to 0"),
        ([], "prompt", "at least 1 item"),
        ([1, "a"], "prompt.1", "valid integer"),
        (["a", 1], "prompt.1", "valid string"),
        (["a", ["b"]], "prompt.1", "valid string"),
        ([True], "prompt", "true"),
        (3, "prompt", "valid string"),
        ({"text": "a"}, "prompt", "valid string"),
        (None, "prompt", "required"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_named_with_the_reason(prompt: Any, param: str, reason: str) -> None:
    error = refusal(prompt=prompt)
    assert (error.status, error.param) == (400, param)
    assert reason in error.message


@pytest.mark.parametrize(
    ("biases", "reason"),
    [
        ({"a": 1, "5": 1, "-3": 2, "1.5": 0}, "'a', '-3', '1.5' is not allowed"),
        ({f"w{i}": 1 for i in range(12)}, "'w9' and 2 more is not allowed"),
        ({"5": 1, " 5": 2}, "the same token id"),
    ],
)
def test_every_bias_of_no_token_is_named(biases: dict[str, float], reason: str) -> None:
    error = refusal(prompt="a", logit_bias=biases)
    assert (error.param, reason in error.message) == ("logit_bias", True), error.message
