"""Declares a response and the events of its stream, like the replies in `openai_api.schemas`.

A stream says that the response is created and in progress; then, per item of the output, that it is added, what it says, and
that it is done; at the end the whole response once more, completed, incomplete (cut by a limit) or, after an error, failed.
Every event says its place in the stream.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field
from typing_extensions import TypedDict

from serve_app.openai_api.schemas import (
    CaptureFields,
    ChosenToken,
    Count,
    ErrorDetail,
    ProbeFields,
    PromptIds,
    PromptLogprobs,
    StopFields,
)

Status = Literal["in_progress", "completed", "incomplete"]
"""Status of an item: being generated, complete, or cut off."""


class TextContent(TypedDict):
    """Text of the reply; `logprobs` is empty unless requested by `include`."""

    type: Literal["output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)]
    logprobs: list[ChosenToken]


class ReasoningContent(TypedDict):
    """Text of the model's reasoning."""

    type: Literal["reasoning_text"]
    text: str


class MessageItem(TypedDict):
    """A message by the model."""

    type: Literal["message"]
    id: str
    role: Literal["assistant"]
    status: Status
    content: list[TextContent]


class ReasoningOutput(TypedDict):
    """The model's reasoning, without a summary."""

    type: Literal["reasoning"]
    id: str
    status: Status
    summary: Annotated[list[Any], Field(max_length=0)]
    content: list[ReasoningContent]


class CallItem(TypedDict):
    """A tool call by the model; `arguments` is JSON unless the reply was cut off."""

    type: Literal["function_call"]
    id: str
    call_id: str
    name: str
    arguments: str
    status: Status


OutputItem = MessageItem | ReasoningOutput | CallItem


class InputTokensDetails(TypedDict):
    """Details of the input tokens: how many were found in the prefix cache. Writes to the cache are not counted."""

    cached_tokens: Count
    cache_write_tokens: Literal[0]


class OutputTokensDetails(TypedDict):
    """Details of the output tokens: how many are reasoning, including its markers."""

    reasoning_tokens: Count


class ResponseUsage(TypedDict):
    """Token counts."""

    input_tokens: Count
    input_tokens_details: InputTokensDetails
    output_tokens: Count
    output_tokens_details: OutputTokensDetails
    total_tokens: Count


class ResponseError(TypedDict):
    """The error of a failed stream: OpenAI's code, and the message."""

    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class IncompleteDetails(TypedDict):
    """Why a reply was cut off: `max_output_tokens`, which OpenAI also uses for the model's context."""

    reason: Literal["max_output_tokens"]


class OfferedTool(TypedDict):
    """A function that the model could call."""

    type: Literal["function"]
    name: str
    description: str | None
    parameters: dict[str, Any]
    strict: bool


class ChosenFunction(TypedDict):
    """A function, by its name."""

    type: Literal["function"]
    name: str


class AllowedChoice(TypedDict):
    """The functions that the model was allowed to call."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[ChosenFunction]


class PlainFormat(TypedDict):
    """Any text, or any JSON object."""

    type: Literal["text", "json_object"]


class SchemaFormat(TypedDict):
    """JSON that matches a schema."""

    type: Literal["json_schema"]
    name: str
    schema: dict[str, Any]
    description: str | None
    strict: bool


class TextConfig(TypedDict):
    """The required format of the text."""

    format: PlainFormat | SchemaFormat
    verbosity: Literal["medium"]


class ReasoningConfig(TypedDict):
    """Settings of the reasoning; no summary is made."""

    effort: str | None
    summary: None


class Response(CaptureFields, StopFields, ProbeFields):
    """A response. In a stream's first events its `output` is empty and its `usage` null."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    output: list[OutputItem]
    usage: ResponseUsage | None
    model: str
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    temperature: float
    top_p: float
    top_logprobs: Count
    tools: list[OfferedTool]
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction | AllowedChoice
    parallel_tool_calls: bool
    text: TextConfig
    reasoning: ReasoningConfig
    truncation: Literal["auto", "disabled"]
    metadata: dict[str, str]
    user: str | None
    service_tier: Literal["default"]
    previous_response_id: None
    store: Literal[False]
    background: Literal[False]
    prompt_token_ids: PromptIds
    prompt_logprobs: PromptLogprobs


class Event(TypedDict):
    """Fields of every event."""

    sequence_number: Count


class StateEvent(Event):
    """The response has started or ended."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: Response


class ItemEvent(Event):
    """An output item has started or is complete."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: Count
    item: OutputItem


class ItemPartEvent(Event):
    """Fields of events about a part of an item."""

    item_id: str
    output_index: Count


class ContentPartEvent(ItemPartEvent):
    """A part of a message or of the reasoning has started or is complete."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    content_index: Literal[0]
    part: TextContent | ReasoningContent


class DeltaEvent(ProbeFields, ItemPartEvent):
    """Fields of events with more text: the text, and probe scores since the last event."""

    delta: str


class TextDeltaEvent(DeltaEvent):
    """More text of a message."""

    type: Literal["response.output_text.delta"]
    content_index: Literal[0]
    logprobs: list[ChosenToken]


class TextDoneEvent(ItemPartEvent):
    """The complete text of a message."""

    type: Literal["response.output_text.done"]
    content_index: Literal[0]
    text: str
    logprobs: list[ChosenToken]


class ReasoningDeltaEvent(DeltaEvent):
    """More text of the reasoning."""

    type: Literal["response.reasoning_text.delta"]
    content_index: Literal[0]


class ReasoningDoneEvent(ItemPartEvent):
    """The complete text of the reasoning."""

    type: Literal["response.reasoning_text.done"]
    content_index: Literal[0]
    text: str


class ArgumentsDeltaEvent(DeltaEvent):
    """More of a tool call's arguments."""

    type: Literal["response.function_call_arguments.delta"]


class ArgumentsDoneEvent(ItemPartEvent):
    """The complete arguments of a tool call."""

    type: Literal["response.function_call_arguments.done"]
    name: str
    arguments: str


class ErrorEvent(Event):
    """The stream has failed. OpenAI's clients read the error here, or in the envelope."""

    type: Literal["error"]
    code: str | None
    message: str
    param: str | None
    error: ErrorDetail


ResponseEvent = (
    StateEvent
    | ItemEvent
    | ContentPartEvent
    | TextDeltaEvent
    | TextDoneEvent
    | ReasoningDeltaEvent
    | ReasoningDoneEvent
    | ArgumentsDeltaEvent
    | ArgumentsDoneEvent
    | ErrorEvent
)
EVENTS: tuple[type, ...] = get_args(ResponseEvent)
"""All types of events."""
