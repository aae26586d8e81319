"""A chat request's messages, tools and response format.

These are OpenAI's wire formats, validated once, so that `prompt` and `grammars` can rely on them. SDKs send null for "not
given", so nulls are dropped first. A conversation's history repeats earlier replies, and servers add fields of their own to
these (`annotations`, `parsed`, `provider_specific_fields`). So unknown fields of an assistant's message, of content parts and
of tool calls are dropped. In everything else an unknown field may be content that the model would not see, and is refused by
name.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ModelWrapValidatorHandler,
    PrivateAttr,
    TypeAdapter,
    field_validator,
    model_validator,
)

NAME = r"^[A-Za-z0-9_-]{1,64}$"
"""OpenAI's rule for the names of functions and of schemas."""


class Wire(BaseModel):
    """An object in a request's body: null means absent, and unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, body: Any) -> Any:
        return {key: value for key, value in body.items() if value is not None} if isinstance(body, dict) else body


class LenientWire(Wire):
    """An object that another server may have written: unknown fields are dropped."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"additionalProperties": True})


class TextPart(LenientWire):
    """A part of a message's content; an assistant's refusal counts as its text."""

    type: Literal["text", "input_text", "output_text", "refusal"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, body: Any) -> Any:
        if isinstance(body, dict) and body.get("type") == "refusal" and "refusal" in body:
            return {"type": "refusal", "text": body["refusal"]}
        return body


_PARTS = TypeAdapter(list[TextPart])
SEPARATOR = "\n"
"""Separator between content parts for chat templates that take one text, as in vLLM."""


def _join(content: Any) -> Any:
    return SEPARATOR.join(_texts(content)) if isinstance(content, list) else content


def _texts(content: Any) -> list[str]:
    return [part.text for part in _PARTS.validate_python(content)]


class CalledFunction(LenientWire):
    """The function of a tool call."""

    name: str = Field(pattern=NAME)
    """The function's name."""
    arguments: str
    """The arguments as JSON text, as the model wrote it."""


class ToolCall(LenientWire):
    """A tool call that the assistant made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


METADATA_FIELDS = frozenset({"annotations", "cache_control", "id", "metadata", "provider_specific_fields", "timestamp"})
"""Fields that clients add to any message; they are metadata, not content."""

CONTENT_FIELDS = frozenset({"audio", "partial", "prefix"})
"""Fields of an assistant's message that cannot be dropped: they are content, or request a continuation."""


class Message(Wire):
    """One message of a conversation."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": True})

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    """The speaker; a message of role `function` is converted to `tool`."""
    content: Annotated[str, BeforeValidator(_join, json_schema_input_type=str | list[TextPart] | None)] = ""
    """The text; empty for an assistant that only called tools, and for a tool without output."""
    name: str | None = None
    """The speaker's name."""
    tool_calls: list[ToolCall] = []
    """An assistant's tool calls."""
    reasoning_content: str | None = None
    """An assistant's reasoning."""
    tool_call_id: str | None = None
    """Id of the call that a tool's message answers."""
    _parts: tuple[str, ...] = PrivateAttr(default=())

    @property
    def parts(self) -> tuple[str, ...]:
        """The texts of the content's parts; one if the content is a text."""
        return self._parts or (self.content,)

    @model_validator(mode="wrap")
    @classmethod
    def _keep_parts(cls, body: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        body = _modernized(body, frozenset(cls.model_fields))
        message = handler(body)
        if isinstance(body, dict) and isinstance(body.get("content"), list):
            message._parts = tuple(_texts(body["content"]))
        return message

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        if self.role != "assistant" and (odd := self.model_fields_set & {"tool_calls", "reasoning_content"}):
            raise ValueError(
                f"{min(odd)}: allowed only in an assistant's message; this message has the role {self.role}"
            )
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("tool_call_id: required in a tool's message, and allowed only there")
        if "content" not in self.model_fields_set and self.role not in ("assistant", "tool"):
            raise ValueError("content: required, except in messages of an assistant or a tool")
        return self


def _modernized(body: Any, fields: frozenset[str]) -> Any:
    """Convert a message to OpenAI's current format, without metadata; other values are returned unchanged.

    Args:
        body: the message as it was sent.
        fields: names of a message's fields.
    """
    if not isinstance(body, dict):
        return body
    # Empty values mean the same as null.
    sent = {key: value for key, value in body.items() if key == "content" or value not in (None, [], {}, "")}
    if sent.get("role") == "function":
        sent |= {"role": "tool", "tool_call_id": _id_of_function(sent.get("name"))}
    if sent.get("role") != "assistant":
        return {key: value for key, value in sent.items() if key not in METADATA_FIELDS}
    if isinstance(sent.get("reasoning"), str):
        sent.setdefault("reasoning_content", sent["reasoning"])
    if isinstance(sent.get("refusal"), str):
        content = sent.get("content") or []
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        sent["content"] = [*parts, {"type": "refusal", "refusal": sent["refusal"]}]
    if isinstance(function := sent.get("function_call"), dict):
        sent.setdefault("tool_calls", [{"id": _id_of_function(function.get("name")), "function": function}])
    # False values have no effect.
    return {key: value for key, value in sent.items() if key in fields or (key in CONTENT_FIELDS and value)}


def _id_of_function(name: Any) -> str:
    """Return an id for a call in the old format, which has one call per message and no ids."""
    return f"function_{name}"


def check_tool_results(messages: Sequence[Message]) -> None:
    """Check that each tool message answers a call of the preceding assistant message.

    Raises:
        ValueError: for the first message that does not.
    """
    open_calls: set[str] = set()
    for place, message in enumerate(messages):
        if message.role != "tool":
            open_calls = {call.id for call in message.tool_calls}
        elif message.tool_call_id in open_calls:
            open_calls.remove(message.tool_call_id)
        else:
            raise ValueError(
                f"messages.{place}.tool_call_id: {message.tool_call_id!r} is not a call of the preceding assistant message"
                + (f"; its unanswered calls: {', '.join(sorted(open_calls))}" if open_calls else "")
            )


class Function(Wire):
    """A function that the model may call."""

    name: str = Field(pattern=NAME)
    """The function's name: letters, digits, `_` and `-`."""
    description: str | None = None
    """A description for the model."""
    parameters: dict[str, JsonValue] = {"type": "object", "properties": {}}
    """JSON schema of the arguments, which are an object; by default it has no properties."""
    strict: bool = False
    """Refuse a schema with a keyword that cannot be enforced; otherwise the keyword is only shown to the model."""

    @field_validator("parameters")
    @classmethod
    def _describes_an_object(cls, parameters: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if parameters.get("type", "object") != "object":
            raise ValueError('a function\'s arguments are an object, so "type" must be "object"')
        return {"type": "object", **parameters}


class Tool(Wire):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class FunctionName(LenientWire):
    """The name of a function; clients may repeat its other fields."""

    name: str = Field(pattern=NAME)


class NamedToolChoice(Wire):
    """A tool choice that requires one function."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(Wire):
    """A subset of the tools, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: list[NamedToolChoice] = Field(min_length=1)


class AllowedToolsChoice(Wire):
    """A tool choice that allows a subset of the tools; the model is shown all of them."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _parse_choice(choice: Any) -> Any:
    # Validated here instead of as a union, so that an error names the invalid field.
    if not isinstance(choice, dict):
        return choice
    kind = AllowedToolsChoice if choice.get("type") == "allowed_tools" else NamedToolChoice
    return kind.model_validate(choice)


ToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedToolChoice | AllowedToolsChoice, BeforeValidator(_parse_choice)
]
"""Which tools are called: none, any that the model chooses, at least one, a named one, or some of a subset."""


def callable_names(choice: ToolChoice) -> frozenset[str] | None:
    """Return the names of the functions that a tool choice allows; None for all."""
    if isinstance(choice, NamedToolChoice):
        return frozenset({choice.function.name})
    if isinstance(choice, AllowedToolsChoice):
        return frozenset(tool.function.name for tool in choice.allowed_tools.tools)
    return None


class JsonSchema(Wire):
    """The schema that a reply must match."""

    name: str = Field(pattern=NAME)
    """The client's name for the schema."""
    schema_: dict[str, JsonValue] = Field(alias="schema", default={"type": "object"})
    """The JSON schema, `schema` on the wire; by default any object."""
    description: str | None = None
    """The schema's purpose."""
    strict: bool = False
    """Refuse a schema with a keyword that cannot be enforced; otherwise the keyword is ignored."""


class ResponseFormat(Wire):
    """The format of a reply: any text, a JSON object, or JSON that matches a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('json_schema is required with type "json_schema", and allowed only with it')
        return self
