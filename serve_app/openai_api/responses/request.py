"""The request to `/v1/responses`, and its conversion to a chat request.

Fields that a chat also has are declared with the chat's; the other fields are checked and converted here. The chat request is
created during validation, so that errors of the chat are raised early, with this route's parameter names (`renamed`).
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, JsonValue, PrivateAttr, TypeAdapter, ValidationError, model_validator

from roentgen.contract import Int, MaxTokens
from serve_app.openai_api.chat import ChatRequest
from serve_app.openai_api.effort import Effort
from serve_app.openai_api.errors import ApiError, from_validation
from serve_app.openai_api.messages import NAME, Wire
from serve_app.openai_api.neutral import Only
from serve_app.openai_api.params import MAX_TOP_LOGPROBS, GenerationParams
from serve_app.openai_api.responses.items import Item, chat_messages
from serve_app.openai_api.responses.schemas import PlainFormat, SchemaFormat

_ITEMS = TypeAdapter(list[Item])


def _read_items(given: Any) -> Any:
    # Validated here instead of as a union, so that an error names the invalid field.
    return _ITEMS.validate_python(given) if isinstance(given, list) else given


Input = Annotated[
    str | list[Item],
    Field(min_length=1),
    BeforeValidator(
        _read_items,
        json_schema_input_type=Annotated[str, Field(min_length=1)] | Annotated[list[Item], Field(min_length=1)],
    ),
]

LOGPROBS = "message.output_text.logprobs"

Include = Literal[
    "message.output_text.logprobs",
    # Items that this server never returns, or returns unencrypted.
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class FunctionTool(Wire):
    """A function that the model may call."""

    type: Literal["function"]
    name: str = Field(pattern=NAME)
    description: str | None = None
    parameters: dict[str, JsonValue] = Field(default={"type": "object", "properties": {}})
    strict: bool = False

    def for_chat(self) -> dict[str, Any]:
        """Convert it to a chat's tool."""
        return {"type": "function", "function": self.model_dump(exclude={"type"})}


class FunctionChoice(Wire):
    """The function that must be called."""

    type: Literal["function"]
    name: str = Field(pattern=NAME)


class ResponseAllowedTools(Wire):
    """A tool choice that allows a subset of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[FunctionChoice] = Field(min_length=1)


def _read_choice(choice: Any) -> Any:
    if not isinstance(choice, dict):
        return choice
    return (ResponseAllowedTools if choice.get("type") == "allowed_tools" else FunctionChoice).model_validate(choice)


Choice = Annotated[
    Literal["none", "auto", "required"] | FunctionChoice | ResponseAllowedTools,
    BeforeValidator(
        _read_choice, json_schema_input_type=Literal["none", "auto", "required"] | FunctionChoice | ResponseAllowedTools
    ),
]


class TextFormat(Wire):
    """The format of the text: any text, a JSON object, or JSON that matches a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(pattern=NAME)] | None = None
    schema_: dict[str, JsonValue] | None = Field(alias="schema", default=None)
    description: str | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        given = self.model_fields_set - {"type"}
        if self.type != "json_schema" and given:
            raise ValueError(f"{min(given).rstrip('_')}: allowed only with type json_schema")
        if self.type == "json_schema" and not given >= {"name", "schema_"}:
            raise ValueError("schema: type json_schema requires name and schema")
        return self

    def for_chat(self) -> dict[str, Any]:
        """Convert it to a chat's `response_format`."""
        if self.type != "json_schema":
            return {"type": self.type}
        return {"type": self.type, "json_schema": self.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)}

    def described(self) -> PlainFormat | SchemaFormat:
        """Return the format as part of the response."""
        if self.type != "json_schema":
            return {"type": self.type}
        return {
            "type": self.type,
            "name": self.name or "",
            "schema": self.schema_ or {},
            "description": self.description,
            "strict": bool(self.strict),
        }


class TextOptions(Wire):
    """`text`: the format of the text."""

    format: TextFormat = TextFormat(type="text")
    verbosity: Annotated[JsonValue, Only("medium")] = "medium"


class Reasoning(Wire):
    """`reasoning`: settings of the reasoning. The whole reasoning is returned, so no summary is made."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class ResponsesRequest(GenerationParams):
    """The body of a request for a response (docs/http.md)."""

    input: Input
    instructions: str | None = None
    max_output_tokens: MaxTokens | None = None
    tools: list[FunctionTool] = Field(default=[], max_length=128)
    tool_choice: Choice = "auto"
    parallel_tool_calls: bool = True
    text: TextOptions = TextOptions()
    reasoning: Reasoning = Reasoning()
    include: list[Include] = Field(default=[])
    top_logprobs: Int = Field(default=0, ge=0, le=MAX_TOP_LOGPROBS)
    truncation: Literal["auto", "disabled"] = "disabled"
    """A prompt that is too long is refused, or with "auto" truncated at its start, as by `truncate_prompt_tokens`."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    n: Int = Field(default=1, ge=1, le=1)
    # Parameters without effect.
    background: Annotated[JsonValue, Only(False)] = False
    max_tool_calls: Annotated[Int, Field(ge=1)] | None = None  # concerns tools that a server runs

    _chat: ChatRequest = PrivateAttr()
    _places: list[int] = PrivateAttr()

    @model_validator(mode="before")
    @classmethod
    def _keeps_nothing(cls, body: Any) -> Any:
        if isinstance(body, dict):
            for name in ("previous_response_id", "conversation", "prompt"):
                if body.get(name) is not None:
                    raise ValueError(
                        f"{name}: the server stores no conversations; send the whole conversation as input"
                    )
        return body

    @model_validator(mode="after")
    def _is_a_chat(self) -> Self:
        if self.top_logprobs and not self.scores_tokens:
            raise ValueError(f"top_logprobs: allowed only with include: [{LOGPROBS!r}]")
        items = self.input
        messages: list[dict[str, Any]]
        if isinstance(items, str):
            messages, self._places = [{"role": "user", "content": items}], [0]
        else:
            messages, self._places = chat_messages(items)
        if self.instructions is not None:
            messages.insert(0, {"role": "system", "content": self.instructions})
            self._places.insert(0, 0)
        if len(messages) == (self.instructions is not None):
            raise ValueError("input: contains no message")
        shared = {name: getattr(self, name) for name in self.model_fields_set & _SHARED}
        try:
            self._chat = ChatRequest.model_validate({**shared, "messages": messages, **self._rewritten()})
        except ValidationError as error:
            raise ValueError(self.renamed(from_validation(list(error.errors()))).message) from error
        return self

    def _rewritten(self) -> dict[str, Any]:
        """Return the fields that have another format in a chat request."""
        choice: Any = self.tool_choice
        if isinstance(choice, FunctionChoice):
            choice = _named(choice)
        elif isinstance(choice, ResponseAllowedTools):
            allowed = {"mode": choice.mode, "tools": [_named(tool) for tool in choice.tools]}
            choice = {"type": "allowed_tools", "allowed_tools": allowed}
        cut = (
            {"truncate_prompt_tokens": -1} if self.truncation == "auto" and self.truncate_prompt_tokens is None else {}
        )
        return {
            **cut,
            "max_completion_tokens": self.max_output_tokens,
            "tools": [tool.for_chat() for tool in self.tools],
            "tool_choice": choice,
            "response_format": self.text.format.for_chat(),
            "reasoning_effort": self.reasoning.effort,
            "logprobs": self.scores_tokens,
        }

    @property
    def chat(self) -> ChatRequest:
        """The request as a chat request."""
        return self._chat

    def asking(self, chat: ChatRequest) -> Self:
        """Return a copy with another chat request."""
        copied = self.model_copy()
        copied._chat = chat
        return copied

    @property
    def scores_tokens(self) -> bool:
        """Whether the response contains log-probabilities."""
        return LOGPROBS in self.include

    def renamed(self, error: ApiError) -> ApiError:
        """Return an error about the chat request with this route's parameter names."""
        if error.param is None:
            return error
        name = error.param
        if found := re.match(r"messages\.(\d+)", name):
            place = int(found[1])
            is_instructions = place == 0 and self.instructions is not None
            here = "instructions" if is_instructions else f"input.{self._places[place]}"
            name = here + name[found.end() :].replace("tool_call_id", "call_id")
        for there, here in _NAMES:
            name = re.sub(there, here, name)
        message = (
            name + error.message.removeprefix(error.param) if error.message.startswith(error.param) else error.message
        )
        return ApiError(error.status, message, param=name, code=error.code, retry_after_s=error.retry_after_s)


_NAMES = (
    (r"^messages$", "input"),
    (r"^max_(completion_)?tokens$", "max_output_tokens"),
    (r"^response_format(\.json_schema)?", "text.format"),
    (r"^(tools\.\d+)\.function\b", r"\1"),
    (r"^logprobs$", "include"),
    (r"^reasoning_effort$", "reasoning.effort"),
)

_OF_CHATS = {
    "top_logprobs", "parallel_tool_calls", "chat_template_kwargs", "add_generation_prompt", "continue_final_message"
}  # fmt: skip
_SHARED = (GenerationParams.model_fields.keys() | _OF_CHATS) - {"n", "stream_options"}
"""Fields with the same meaning in a chat request."""


def _named(choice: FunctionChoice) -> dict[str, Any]:
    return {"type": "function", "function": {"name": choice.name}}
