"""What a response is, whole and as the events of a stream; declared as the replies of `openai_api.schemas` are.

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
"""Of an item: still being said, said, or cut."""


class TextContent(TypedDict):
    """Words of the reply; `logprobs` is empty unless they were asked for (`include`)."""

    type: Literal["output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)]
    logprobs: list[ChosenToken]


class ReasoningContent(TypedDict):
    """Thoughts of the model, as it had them."""

    type: Literal["reasoning_text"]
    text: str


class MessageItem(TypedDict):
    """What the model says."""

    type: Literal["message"]
    id: str
    role: Literal["assistant"]
    status: Status
    content: list[TextContent]


class ReasoningOutput(TypedDict):
    """What the model thinks; nobody summarises it."""

    type: Literal["reasoning"]
    id: str
    status: Status
    summary: Annotated[list[Any], Field(max_length=0)]
    content: list[ReasoningContent]


class CallItem(TypedDict):
    """A call that the model makes; `arguments` is JSON unless the reply was cut."""

    type: Literal["function_call"]
    id: str
    call_id: str
    name: str
    arguments: str
    status: Status


OutputItem = MessageItem | ReasoningOutput | CallItem


class InputTokensDetails(TypedDict):
    """Of the prompt's tokens: how many were found in the prefix cache, and not read again. Writing to it is not counted."""

    cached_tokens: Count
    cache_write_tokens: Literal[0]


class OutputTokensDetails(TypedDict):
    """Of the tokens written: how many are thoughts, the marks around them included."""

    reasoning_tokens: Count


class ResponseUsage(TypedDict):
    """Tokens read and written."""

    input_tokens: Count
    input_tokens_details: InputTokensDetails
    output_tokens: Count
    output_tokens_details: OutputTokensDetails
    total_tokens: Count


class ResponseError(TypedDict):
    """Why a stream failed: OpenAI's word for the kind, and what an error's envelope would say."""

    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class IncompleteDetails(TypedDict):
    """Why a reply was cut: `max_output_tokens`, or the model's context, which OpenAI calls the same."""

    reason: Literal["max_output_tokens"]


class OfferedTool(TypedDict):
    """A function that was on offer."""

    type: Literal["function"]
    name: str
    description: str | None
    parameters: dict[str, Any]
    strict: bool


class ChosenFunction(TypedDict):
    """A function by its name."""

    type: Literal["function"]
    name: str


class AllowedChoice(TypedDict):
    """The functions that were allowed."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[ChosenFunction]


class PlainFormat(TypedDict):
    """Any words, or any JSON object."""

    type: Literal["text", "json_object"]


class SchemaFormat(TypedDict):
    """JSON that matches a schema."""

    type: Literal["json_schema"]
    name: str
    schema: dict[str, Any]
    description: str | None
    strict: bool


class TextConfig(TypedDict):
    """How the words had to be."""

    format: PlainFormat | SchemaFormat
    verbosity: Literal["medium"]


class ReasoningConfig(TypedDict):
    """How the model was to think; no summary is made."""

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
    """What every event has: its place in the stream."""

    sequence_number: Count


class StateEvent(Event):
    """The response begins, or has ended."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: Response


class ItemEvent(Event):
    """An item of the output begins, or is there as a whole."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: Count
    item: OutputItem


class ItemPartEvent(Event):
    """What events about a part of an item have."""

    item_id: str
    output_index: Count


class ContentPartEvent(ItemPartEvent):
    """A part of a message or of the reasoning begins, or is there as a whole."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    content_index: Literal[0]
    part: TextContent | ReasoningContent


class DeltaEvent(ProbeFields, ItemPartEvent):
    """What the events that say more have: the text, and scores of the probes that have come since the last."""

    delta: str


class TextDeltaEvent(DeltaEvent):
    """More words."""

    type: Literal["response.output_text.delta"]
    content_index: Literal[0]
    logprobs: list[ChosenToken]


class TextDoneEvent(ItemPartEvent):
    """All words."""

    type: Literal["response.output_text.done"]
    content_index: Literal[0]
    text: str
    logprobs: list[ChosenToken]


class ReasoningDeltaEvent(DeltaEvent):
    """More thoughts."""

    type: Literal["response.reasoning_text.delta"]
    content_index: Literal[0]


class ReasoningDoneEvent(ItemPartEvent):
    """All thoughts."""

    type: Literal["response.reasoning_text.done"]
    content_index: Literal[0]
    text: str


class ArgumentsDeltaEvent(DeltaEvent):
    """More of a call's arguments."""

    type: Literal["response.function_call_arguments.delta"]


class ArgumentsDoneEvent(ItemPartEvent):
    """All of a call's arguments."""

    type: Literal["response.function_call_arguments.done"]
    name: str
    arguments: str


class ErrorEvent(Event):
    """The stream has failed. OpenAI's clients look for what is wrong here, or in the envelope."""

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
"""Each kind of event."""
