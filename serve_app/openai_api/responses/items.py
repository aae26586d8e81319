"""The `input` of a response: items in, messages out.

A turn of the assistant is several items here (its reasoning, its words, each call) and one message for a chat, so items that
follow one another are joined: reasoning belongs to what comes after it, calls to the words before them. Items that a server
wrote come back with whatever that server adds to them (`status`, `annotations`, …), so unknown fields of those are dropped;
in what a client writes they are refused. Nothing is kept here: a reference to an item has nothing to refer to.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter

from serve_app.openai_api.messages import NAME, Wire


class InputText(Wire):
    """A text part that the client wrote."""

    type: Literal["input_text"]
    text: str


class OutputText(Wire):
    """A text part that a model wrote."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["output_text", "input_text"] = "output_text"
    text: str


class Refusal(Wire):
    """A model's refusal: words like others."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["refusal"]
    text: str = Field(alias="refusal")


class ReasoningText(Wire):
    """A part of a model's thoughts."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["reasoning_text"]
    text: str


_INPUT_PARTS = TypeAdapter(list[InputText])


def _read_input(content: Any) -> Any:
    # Tried here and not as one of a union, so that an error names the field that is wrong.
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
    """A message that the client wrote."""

    type: Literal["message"] = "message"
    role: Literal["user", "system", "developer"]
    content: InputContent
    id: str | None = None
    status: str | None = None


class OutputMessage(Wire):
    """A message that a model wrote."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["message"] = "message"
    role: Literal["assistant"]
    content: OutputContent


class FunctionCallItem(Wire):
    """A call that a model made."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["function_call"]
    call_id: str
    name: str = Field(pattern=NAME)
    arguments: str


class FunctionCallOutput(Wire):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: InputContent
    id: str | None = None
    status: str | None = None


class ReasoningItem(Wire):
    """What a model thought. A summary is not what it thought, and what is encrypted only its own server can read."""

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
    """Read an item as what its `type` says it is; a message may leave that out."""
    if not isinstance(item, dict):
        return item
    kind = item.get("type") or ("message" if "role" in item else "item_reference")
    if kind == "message":
        return (OutputMessage if item.get("role") == "assistant" else InputMessage).model_validate(item)
    if kind == "item_reference":
        raise ValueError(
            "this server keeps no items that one could refer to; send the item itself, as with store: false"
        )
    if kind not in _KINDS:
        raise ValueError(f"items are message, {', '.join(_KINDS)}; this one is {str(kind)[:80]!r}")
    return _KINDS[kind].model_validate(item)


Item = Annotated[AnyItem, BeforeValidator(_read_item, json_schema_input_type=AnyItem)]
"""One item of the input."""


def chat_messages(items: Sequence[AnyItem]) -> tuple[list[dict[str, Any]], list[int]]:
    """Write items as a chat's messages.

    Returns:
        The messages, as a chat request has them, and of each the place of its first item.
    """
    messages: list[dict[str, Any]] = []
    places: list[int] = []
    thoughts: list[str] = []  # of the assistant's turn that comes next

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
