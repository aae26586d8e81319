"""`reasoning_effort`: how much a model is to think, as far as its chat template can tell it.

A template may have the effort as a variable (gpt-oss), a switch for thinking (Qwen 3, DeepSeek 3.1), or neither: then the model
thinks always or never. What a template cannot tell would change nothing, so it is refused; the exception is `medium`, OpenAI's
default, which clients send to any model.
"""

from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from serve_app.engines.markers import THINK_END
from serve_app.openai_api.errors import ApiError
from serve_app.openai_api.prompt import template_variables

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]

SWITCHES = ("enable_thinking", "thinking")
"""What templates call their switch for thinking."""


def effort_variables(tokenizer: PreTrainedTokenizerBase, effort: Effort | None, model: str) -> dict[str, Any]:
    """Return the variables with which a model's chat template asks for an effort.

    Args:
        tokenizer: the model's, with its chat template.
        effort: what the request asks for, None for nothing.
        model: its name, for errors.

    Raises:
        ApiError: if the template cannot ask for it.
    """
    if effort is None or tokenizer.chat_template is None:
        return {}
    source = tokenizer.get_chat_template()
    known = template_variables(source)
    if "reasoning_effort" in known:
        return {"reasoning_effort": effort}
    allowed: tuple[Effort, ...]
    variables: dict[str, Any] = {}
    if switch := next((name for name in SWITCHES if name in known), None):
        able, allowed = "turns thinking on or off and has no degrees", ("none", "medium")
        variables = {switch: effort != "none"}
    elif THINK_END in source:
        able, allowed = "cannot tell it how much to think", ("medium",)
    else:
        able, allowed = "has no thinking", ("none", "medium")
    if effort in allowed:
        return variables
    supported = " or ".join(map(repr, allowed))
    raise ApiError(
        400,
        f"reasoning_effort: {model}'s chat template {able}; it supports only {supported} (given: {effort!r})",
        param="reasoning_effort",
        code="unsupported_value",
    )
