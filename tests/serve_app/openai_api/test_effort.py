"""How much a model is to think: what its template can tell it is told, and anything else is refused."""

from typing import Any, get_args

import pytest

from serve_app.openai_api.effort import Effort, effort_variables
from serve_app.openai_api.errors import ApiError
from tests.serve_app import tiny
from tests.serve_app.openai_api.templates import LLAMA, QWEN

GPT_OSS = (
    "{%- if reasoning_effort is not defined %}{%- set reasoning_effort = 'medium' %}{%- endif %}{{ reasoning_effort }}"
)
DEEPSEEK = (
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{% if thinking %}<think>{% endif %}</think>"
)
ALWAYS = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}<think>\n"


def variables(template: str | None, effort: Any) -> dict[str, Any]:
    words = tiny.tokenizer()
    words.chat_template = template
    return effort_variables(words, effort, "tiny")


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (GPT_OSS, {effort: {"reasoning_effort": effort} for effort in get_args(Effort)}),
        (QWEN, {"none": {"enable_thinking": False}, "medium": {"enable_thinking": True}}),
        (DEEPSEEK, {"none": {"thinking": False}, "medium": {"thinking": True}}),
        (ALWAYS, {"medium": {}}),
        (LLAMA, {"none": {}, "medium": {}}),
    ],
)
def test_an_effort_is_told_or_refused(template: str, told: dict[str, Any]) -> None:
    assert variables(template, None) == {}
    for effort in get_args(Effort):
        if effort in told:
            assert variables(template, effort) == told[effort]
            continue
        with pytest.raises(ApiError, match=f"given: '{effort}'") as caught:
            variables(template, effort)
        assert (caught.value.status, caught.value.param, caught.value.code) == (
            400,
            "reasoning_effort",
            "unsupported_value",
        )
        assert all(repr(one) in caught.value.message for one in told)


def test_a_model_without_a_template_is_refused_elsewhere() -> None:
    assert variables(None, "high") == {}
