"""Converts the `input` items of a response to chat messages.

An assistant's turn consists of several items (reasoning, text, each call) but of one chat message, so adjacent items are
joined: reasoning with the item after it, calls with the text before them. Items written by a server may contain fields of that
server (`status`, `annotations`, …), so their unknown fields are dropped; in items written by a client they are refused. The
server stores no items, so references to items are refused.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter

from serve_app.openai_api.messages import NAME, Wire


class InputText(Wire):
    """A text part written by the client."""

    type: Literal["input_text"]
    text: str


class OutputText(Wire):
    """A text part written by a model."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["output_text", "input_text"] = "output_text"
    text: str


class Refusal(Wire):
    """A model's refusal, which is treated as text."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["refusal"]
    text: str = Field(alias="refusal")


class ReasoningText(Wire):
    """A part of a model's reasoning."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["reasoning_text"]
    text: str


_INPUT_PARTS = TypeAdapter(list[InputText])


def _read_input(content: Any) -> Any:
    # Validated here instead of as a union, so that an error names the invalid field.
    return _INPUT_PARTS.validate_python(content) if isinstance(content, list) else content


def _read_output_part(part: Any) -> Any:
    refused = isinstance(part, dict) and part.get("type") == "refusal"
    return (Refusal if refused else OutputText).model_validate(part)


_OUTPUT_PARTS = TypeAdapter(
    list[
        Annotated[OutputText | Refusal, BeforeValidator(_read_output_part, json_schema_input_type=OutputText | Refusal)]
    ]
)


def _read_output(content: Any) -> Any:
    return _OUTPUT_PARTS.validate_python(content) if isinstance(content, list) else content


InputContent = Annotated[
    str | list[InputText], BeforeValidator(_read_input, json_schema_input_type=str | list[InputText])
]
OutputContent = Annotated[
    str | list[OutputText | Refusal],
    BeforeValidator(_read_output, json_schema_input_type=str | list[OutputText | Refusal]),
]


class InputMessage(Wire):
    """A message written by the client."""

    type: Literal["message"] = "message"
    role: Literal["user", "system", "developer"]
    content: InputContent
    id: str | None = None
    status: str | None = None


class OutputMessage(Wire):
    """A message written by a model."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["message"] = "message"
    role: Literal["assistant"]
    content: OutputContent


class FunctionCallItem(Wire):
    """A tool call by a model."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["function_call"]
    call_id: str
    name: str = Field(pattern=NAME)
    arguments: str


class FunctionCallOutput(Wire):
    """The result of a tool call."""

    type: Literal["function_call_output"]
    call_id: str
    output: InputContent
    id: str | None = None
    status: str | None = None


class ReasoningItem(Wire):
    """A model's reasoning. Summaries and encrypted reasoning are ignored: only their own server can use them."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["reasoning"]
    content: list[ReasoningText] = Field(default=[])


AnyItem = InputMessage | OutputMessage | FunctionCallItem | FunctionCallOutput | ReasoningItem
_KINDS: dict[str, type[AnyItem]] = {
    "function_call": FunctionCallItem,
    "function_call_output": FunctionCallOutput,
    "reasoning": ReasoningItem,
}


def _read_item(item: Any) -> Any:
    """Validate an item by its `type`, which a message may omit."""
    if not isinstance(item, dict):
        return item
    kind = item.get("type") or ("message" if "role" in item else "item_reference")
    if kind == "message":
        return (OutputMessage if item.get("role") == "assistant" else InputMessage).model_validate(item)
    if kind == "item_reference":
        raise ValueError("this server stores no items to refer to; send the item itself, as with store: false")
    if kind not in _KINDS:
        raise ValueError(f"unknown type {str(kind)[:80]!r}; allowed are message, {', '.join(_KINDS)}")
    return _KINDS[kind].model_validate(item)


Item = Annotated[AnyItem, BeforeValidator(_read_item, json_schema_input_type=AnyItem)]
"""An input item."""


def chat_messages(items: Sequence[AnyItem]) -> tuple[list[dict[str, Any]], list[int]]:
    """Convert items to chat messages.

    Returns:
        The messages, and for each the index of its first item.
    """
    messages: list[dict[str, Any]] = []
    places: list[int] = []
    thoughts: list[str] = []  # reasoning of the assistant's next turn

    def begin(place: int, message: dict[str, Any]) -> None:
        if message["role"] == "assistant" and thoughts:
            message["reasoning_content"] = "\n".join(thoughts)
        thoughts.clear()
        messages.append(message)
        places.append(place)

    for place, item in enumerate(items):
        match item:
            case InputMessage():
                begin(place, {"role": item.role, "content": _content(item.content)})
            case OutputMessage():
                begin(place, {"role": "assistant", "content": _content(item.content)})
            case FunctionCallOutput():
                begin(place, {"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output)})
            case ReasoningItem():
                thoughts += [part.text for part in item.content]
            case FunctionCallItem():
                if thoughts or not messages or messages[-1]["role"] != "assistant":
                    begin(place, {"role": "assistant", "content": ""})
                called = {"name": item.name, "arguments": item.arguments}
                messages[-1].setdefault("tool_calls", []).append({"id": item.call_id, "function": called})
    return messages, places


def _content(content: str | Sequence[InputText | OutputText | Refusal]) -> str | list[dict[str, str]]:
    return content if isinstance(content, str) else [{"type": "text", "text": part.text} for part in content]
