"""`reasoning_effort`: how much a model reasons, as far as its chat template supports it.

A template may have a variable for the effort (gpt-oss), a switch for reasoning (Qwen 3, DeepSeek 3.1), or neither: then the
model always or never reasons. A value that the template does not support would have no effect, so it is refused; the exception
is `medium`, OpenAI's default, which clients send to any model.
"""

from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from serve_app.engines.markers import THINK_END
from serve_app.openai_api.errors import ApiError
from serve_app.openai_api.prompt import template_variables

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]

SWITCHES = ("enable_thinking", "thinking")
"""Names of a template's switch for reasoning."""


def effort_variables(tokenizer: PreTrainedTokenizerBase, effort: Effort | None, model: str) -> dict[str, Any]:
    """Return the chat template's variables for an effort.

    Args:
        tokenizer: the model's tokenizer, with its chat template.
        effort: the requested effort; None if the request has none.
        model: the model's name, for errors.

    Raises:
        ApiError: if the template does not support the effort.
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
        able, allowed = "can only turn reasoning on or off", ("none", "medium")
        variables = {switch: effort != "none"}
    elif THINK_END in source:
        able, allowed = "has no setting for reasoning", ("medium",)
    else:
        able, allowed = "has no reasoning", ("none", "medium")
    if effort in allowed:
        return variables
    supported = " or ".join(map(repr, allowed))
    raise ApiError(
        400,
        f"reasoning_effort: {model}'s chat template {able}; it supports only {supported} (given: {effort!r})",
        param="reasoning_effort",
        code="unsupported_value",
    )
