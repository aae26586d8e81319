"""What a chat request is made of besides settings: its messages, its tools, and the shape it asks the reply to have.

Everything here is OpenAI's wire form, checked once, so that what follows (`prompt`, `grammars`) need not doubt it. SDKs spell
"not given" as null, and repeat in a history what a reply gave them (`refusal: null`, `parsed: null`), so nulls are dropped
before fields are looked at; any other unknown field is refused by name. Parts of a content are joined: models see one text.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    TypeAdapter,
    field_validator,
    model_validator,
)

NAME = r"^[A-Za-z0-9_-]{1,64}$"
"""OpenAI's rule for the names of functions and of schemas."""


class Wire(BaseModel):
    """An object of a request's body: null means absent, and what is unknown is refused."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, body: Any) -> Any:
        return {key: value for key, value in body.items() if value is not None} if isinstance(body, dict) else body


class TextPart(Wire):
    """One text part of a message's content."""

    type: Literal["text"]
    text: str


_PARTS = TypeAdapter(list[TextPart])


def _join(content: Any) -> Any:
    return "".join(part.text for part in _PARTS.validate_python(content)) if isinstance(content, list) else content


class CalledFunction(Wire):
    """What a tool call calls."""

    name: str = Field(pattern=NAME)
    """The function."""
    arguments: str
    """JSON, as the model wrote it."""
    parsed_arguments: JsonValue = None
    """The arguments once more; OpenAI's SDK adds them when a parsed reply is sent back. Not used."""


class ToolCall(Wire):
    """A call that the assistant made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Wire):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    """Who speaks."""
    content: Annotated[str, BeforeValidator(_join, json_schema_input_type=str | list[TextPart] | None)] = ""
    """The text; empty for an assistant who only called tools."""
    name: str | None = None
    """The speaker's name."""
    tool_calls: list[ToolCall] = []
    """An assistant's calls."""
    reasoning_content: str | None = None
    """What an assistant thought before it answered."""
    parsed: JsonValue = None
    """The content once more; OpenAI's SDK adds it when a parsed reply is sent back. Not used."""
    tool_call_id: str | None = None
    """The call that a tool answers."""

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        if self.role != "assistant" and (odd := self.model_fields_set & {"tool_calls", "reasoning_content", "parsed"}):
            raise ValueError(f"{min(odd)}: only an assistant's message has it, this one is a {self.role}'s")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("tool_call_id: a tool's message names the call that it answers, and no other message does")
        if "content" not in self.model_fields_set and not self.tool_calls:
            raise ValueError("content: it is missing; only an assistant's message with tool_calls may leave it out")
        return self


def check_tool_results(messages: Sequence[Message]) -> None:
    """Check that the tools' messages answer the calls of the assistant's message before them.

    Raises:
        ValueError: naming the first that does not.
    """
    open_calls: set[str] = set()
    for place, message in enumerate(messages):
        if message.role != "tool":
            open_calls = {call.id for call in message.tool_calls}
        elif message.tool_call_id in open_calls:
            open_calls.remove(message.tool_call_id)
        else:
            raise ValueError(
                f"messages.{place}.tool_call_id: {message.tool_call_id!r} answers no call of the assistant's message before it"
                + (f"; unanswered there: {', '.join(sorted(open_calls))}" if open_calls else "")
            )


class Function(Wire):
    """A function that the model may call."""

    name: str = Field(pattern=NAME)
    """Letters, digits, `_` and `-`."""
    description: str | None = None
    """What it does."""
    parameters: dict[str, JsonValue] = {"type": "object", "properties": {}}
    """A JSON schema of its arguments, which are an object; by default it takes none."""
    strict: bool = False
    """Refuse a schema of which a keyword cannot be enforced; otherwise that keyword is only shown to the model."""

    @field_validator("parameters")
    @classmethod
    def _describes_an_object(cls, parameters: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if parameters.get("type", "object") != "object":
            raise ValueError('a function\'s arguments are an object: "type" must be "object"')
        return {"type": "object", **parameters}


class Tool(Wire):
    """A tool on offer."""

    type: Literal["function"]
    function: Function


class FunctionName(Wire):
    """The function that must be called."""

    name: str


class NamedToolChoice(Wire):
    """A tool choice that leaves no choice."""

    type: Literal["function"]
    function: FunctionName


def _parse_named(choice: Any) -> Any:
    # Tried here and not as one of a union, so that an error names the field that is wrong.
    return NamedToolChoice.model_validate(choice) if isinstance(choice, dict) else choice


ToolChoice = Annotated[Literal["none", "auto", "required"] | NamedToolChoice, BeforeValidator(_parse_named)]
"""Whether tools are called: never, as the model likes, at least one, or this one."""


class JsonSchema(Wire):
    """The schema that a reply must match."""

    name: str = Field(pattern=NAME)
    """What the client calls it."""
    schema_: dict[str, JsonValue] = Field(alias="schema", default={"type": "object"})
    """The JSON schema, on the wire `schema`; by default any object."""
    description: str | None = None
    """What it is for."""
    strict: bool = False
    """Refuse a schema of which a keyword cannot be enforced; otherwise that keyword is not enforced."""


class ResponseFormat(Wire):
    """What a reply must be: any text, a JSON object, or JSON that matches a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('json_schema goes with type "json_schema", and only with that')
        return self
