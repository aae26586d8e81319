"""What a chat request is made of besides settings: its messages, its tools, and the shape it asks the reply to have.

Everything here is OpenAI's wire form, checked once, so that what follows (`prompt`, `grammars`) need not doubt it. SDKs spell
"not given" as null, so nulls are dropped before fields are looked at. A history repeats what a reply said, and every server's
replies have fields of their own (`annotations`, `parsed`, `provider_specific_fields`): in an assistant's message, and in parts
and calls, what is unknown is left out. What the client itself writes has no such excuse: there an unknown field may be content
that the model would not see, and is refused by name.
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
    """An object of a request's body: null means absent, and what is unknown is refused."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, body: Any) -> Any:
        return {key: value for key, value in body.items() if value is not None} if isinstance(body, dict) else body


class Recorded(Wire):
    """An object that another server may have written: what is unknown is left out."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"additionalProperties": True})


class TextPart(Recorded):
    """One part of a message's content; what the assistant refused to say was its text, too."""

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
"""What is between the parts of a content where a chat template takes one text, as in vLLM."""


def _join(content: Any) -> Any:
    return SEPARATOR.join(_texts(content)) if isinstance(content, list) else content


def _texts(content: Any) -> list[str]:
    return [part.text for part in _PARTS.validate_python(content)]


class CalledFunction(Recorded):
    """What a tool call calls."""

    name: str = Field(pattern=NAME)
    """The function."""
    arguments: str
    """JSON, as the model wrote it."""


class ToolCall(Recorded):
    """A call that the assistant made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


BESIDE = frozenset({"annotations", "cache_control", "id", "metadata", "provider_specific_fields", "timestamp"})
"""What clients write beside the words of any message: it is about the message, and no part of it."""

UNSAID = frozenset({"audio", "partial", "prefix"})
"""Fields of an assistant's message that cannot be left out: they hold what it said, or ask for its words to be continued."""


class Message(Wire):
    """One message of a conversation."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": True})

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    """Who speaks; what a function said is a tool's message from here on."""
    content: Annotated[str, BeforeValidator(_join, json_schema_input_type=str | list[TextPart] | None)] = ""
    """The text; empty for an assistant who only called tools, and for a tool that returned none."""
    name: str | None = None
    """The speaker's name."""
    tool_calls: list[ToolCall] = []
    """An assistant's calls."""
    reasoning_content: str | None = None
    """What an assistant thought before it answered."""
    tool_call_id: str | None = None
    """The call that a tool answers."""
    _parts: tuple[str, ...] = PrivateAttr(default=())

    @property
    def parts(self) -> tuple[str, ...]:
        """The texts of the content's parts; one if it was a text."""
        return self._parts or (self.content,)

    @model_validator(mode="wrap")
    @classmethod
    def _keep_parts(cls, body: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        body = _as_written_today(body, frozenset(cls.model_fields))
        message = handler(body)
        if isinstance(body, dict) and isinstance(body.get("content"), list):
            message._parts = tuple(_texts(body["content"]))
        return message

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        if self.role != "assistant" and (odd := self.model_fields_set & {"tool_calls", "reasoning_content"}):
            raise ValueError(f"{min(odd)}: only an assistant's message has it, this one is a {self.role}'s")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("tool_call_id: a tool's message names the call that it answers, and no other message does")
        if "content" not in self.model_fields_set and self.role not in ("assistant", "tool"):
            raise ValueError("content: it is missing; only the messages of an assistant or a tool may leave it out")
        return self


def _as_written_today(body: Any, fields: frozenset[str]) -> Any:
    """Spell a message as OpenAI does now, without what only goes beside it; anything else is returned as it is.

    Args:
        body: the message, as it was sent.
        fields: those that a message has.
    """
    if not isinstance(body, dict):
        return body
    # An empty value says as little as null.
    said = {key: value for key, value in body.items() if key == "content" or value not in (None, [], {}, "")}
    if said.get("role") == "function":
        said |= {"role": "tool", "tool_call_id": _id_of_function(said.get("name"))}
    if said.get("role") != "assistant":
        return {key: value for key, value in said.items() if key not in BESIDE}
    if isinstance(said.get("reasoning"), str):
        said.setdefault("reasoning_content", said["reasoning"])
    if isinstance(said.get("refusal"), str):
        content = said.get("content") or []
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        said["content"] = [*parts, {"type": "refusal", "refusal": said["refusal"]}]
    if isinstance(function := said.get("function_call"), dict):
        said.setdefault("tool_calls", [{"id": _id_of_function(function.get("name")), "function": function}])
    # What is false asks for nothing.
    return {key: value for key, value in said.items() if key in fields or (key in UNSAID and value)}


def _id_of_function(name: Any) -> str:
    """Return the id of the one call that a message could make before there were ids."""
    return f"function_{name}"


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


class FunctionName(Recorded):
    """A function on offer, by its name; clients may repeat the rest of it."""

    name: str = Field(pattern=NAME)


class NamedToolChoice(Wire):
    """A tool choice that leaves no choice."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(Wire):
    """Some of the tools on offer, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: list[NamedToolChoice] = Field(min_length=1)


class AllowedToolsChoice(Wire):
    """A tool choice among some of the tools on offer; the model is shown all of them."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _parse_choice(choice: Any) -> Any:
    # Tried here and not as one of a union, so that an error names the field that is wrong.
    if not isinstance(choice, dict):
        return choice
    kind = AllowedToolsChoice if choice.get("type") == "allowed_tools" else NamedToolChoice
    return kind.model_validate(choice)


ToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedToolChoice | AllowedToolsChoice, BeforeValidator(_parse_choice)
]
"""Whether tools are called: never, as the model likes, at least one, this one, or only some of them."""


def callable_names(choice: ToolChoice) -> frozenset[str] | None:
    """Return the functions that a tool choice names, None if it leaves all of them."""
    if isinstance(choice, NamedToolChoice):
        return frozenset({choice.function.name})
    if isinstance(choice, AllowedToolsChoice):
        return frozenset(tool.function.name for tool in choice.allowed_tools.tools)
    return None


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
