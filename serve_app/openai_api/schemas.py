"""Declares every reply of the server, for type checking and for `/openapi.json`.

A reply is a `TypedDict`: mypy checks it where it is built, and pydantic describes it. At run time it is a plain dict, which
crosses a Serve handle and is serialized without further cost; a stream creates one per token. A key that may be absent is
`NotRequired`; the type of a key that may be null includes None. `documented` converts a declaration to a route's arguments.
All errors have the same envelope.
"""

from typing import Annotated, Any, Literal, NotRequired

from fastapi import FastAPI, Response
from pydantic import Field, GetPydanticSchema, TypeAdapter
from typing_extensions import TypedDict

from roentgen.contract import ActivationReply, ProbeEffect
from roentgen.linear_probe import ScoreUnit
from serve_app.engines.protocol import FinishReason

ERRORS = {
    400: "The request is invalid; `param` names the parameter",
    401: "No valid API key",
    403: "The server's configuration does not allow it",
    404: "The model, session or route does not exist",
    405: "The route does not support this method",
    408: "The request exceeded the server's time limit",
    409: "The session is being written",
    413: "The body is too large",
    429: "The queue is full; retry after `Retry-After` seconds",
    500: "Internal error, or the disk is full",
    503: "The model is loading, could not be loaded, or its replica was lost",
}
"""The HTTP statuses of errors."""


Count = Annotated[int, Field(ge=0)]

ErrorType = Literal[
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "not_found_error",
    "rate_limit_error",
    "server_error",
    "service_unavailable_error",
]


class ErrorDetail(TypedDict):
    """An error in OpenAI's format."""

    message: str
    type: ErrorType
    param: str | None
    code: str | None


class ErrorReply(TypedDict):
    """OpenAI's error envelope."""

    error: ErrorDetail


class PromptTokensDetails(TypedDict):
    """Details of the prompt tokens."""

    cached_tokens: Annotated[Count, Field(description="Prompt tokens found in the prefix cache.")]


class Usage(TypedDict):
    """Token counts."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: Annotated[
        PromptTokensDetails | None, Field(description="null in a stream's chunks until all choices have ended.")
    ]


class ChosenRollout(ActivationReply):
    """The activations of one of several choices."""

    choice_index: Count


class RolloutList(TypedDict):
    """The activations of several choices."""

    session_id: str
    rollouts: list[Annotated[dict[str, Any], GetPydanticSchema(lambda _, handler: handler(ChosenRollout))]]


Activations = Annotated[dict[str, Any], GetPydanticSchema(lambda _, handler: handler(ActivationReply))] | RolloutList
"""A reply's `activations`: an `ActivationReply` as a dict, or a list of them."""


class CaptureFields(TypedDict):
    """Fields of a reply to a request with activations."""

    activations: NotRequired[Annotated[Activations, Field(description="Present if requested.")]]


class Reply(CaptureFields):
    """Fields of every generation's reply and of its chunks."""

    id: str
    created: int
    model: str


class UsageFields(TypedDict):
    """Fields of a stream's last chunk with `include_usage`."""

    usage: NotRequired[Usage]


class ScoredToken(TypedDict):
    """A token and its log-probability."""

    token: str
    logprob: Annotated[float | None, Field(description="null for a forced token, which the model did not sample.")]
    bytes: list[int]


class ChosenToken(ScoredToken):
    """A token of the reply, and its most likely alternatives."""

    top_logprobs: list[ScoredToken]


class ChatLogprobs(TypedDict):
    """Log-probabilities of a reply's tokens."""

    content: list[ChosenToken]
    refusal: None


class FunctionCall(TypedDict):
    """A function's name and arguments, which are JSON unless the reply was cut off."""

    name: str
    arguments: str


class MadeToolCall(TypedDict):
    """A tool call by the model."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(TypedDict):
    """The model's message; `content` is null if it only calls tools."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[Annotated[str, Field(description="The reasoning; absent if there is none.")]]
    tool_calls: NotRequired[Annotated[list[MadeToolCall], Field(description="Absent if there are none.")]]


class ScoreAction(TypedDict):
    """The action of a probe on a choice, and the token whose score caused it."""

    then: ProbeEffect
    position: Count
    score: float


class ProbeScores(TypedDict):
    """One probe's scores of a choice's tokens from position `start`; a list per token if the probe has several outputs."""

    probe: str
    key: str
    label: str
    classes: list[str]
    unit: Annotated[ScoreUnit, Field(description="Unit of a score: log-odds, logits, a value of the label, or none.")]
    n_prompt: Annotated[int, Field(ge=1)]
    start: Count
    scores: list[float] | list[list[float]]
    acted: NotRequired[Annotated[ScoreAction, Field(description="Present if its `stop_when` condition was met.")]]


class ProbeFields(TypedDict):
    """Fields of a choice in a request with probes."""

    probes: NotRequired[Annotated[list[ProbeScores], Field(description="Present if requested.")]]


class StopFields(TypedDict):
    """Fields of a choice with its stop reason and token ids; they are vLLM's, like `prompt_logprobs`."""

    stop_reason: Annotated[
        int | str | None,
        Field(description="The request's stop string or stop token that ended the choice, or `probe:NAME`."),
    ]
    token_ids: Annotated[
        list[int] | None, Field(description="All generated token ids; with `return_token_ids`, probes or rows.")
    ]


class ChunkStopFields(TypedDict):
    """The same fields of a chunk: its new tokens, and `stop_reason` together with `finish_reason`."""

    stop_reason: NotRequired[int | str | None]
    token_ids: NotRequired[list[int]]


class PromptToken(TypedDict):
    """A token's log-probability at a position of the prompt, and its rank there, from 1."""

    logprob: float
    rank: Annotated[int, Field(ge=1)]
    decoded_token: str


PromptIds = Annotated[list[int] | None, Field(description="Present with `return_token_ids`, probes or rows.")]
PromptLogprobs = Annotated[
    list[dict[str, PromptToken] | None] | None,
    Field(description="With `prompt_logprobs`: per position, by token id, the token itself and the most likely ones."),
]

ChatFinishReason = FinishReason | Literal["tool_calls"]


class ChatChoice(StopFields, ProbeFields):
    """One of `n` replies to a conversation."""

    index: Count
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason


class ChatCompletion(Reply):
    """A reply to a conversation."""

    object: Literal["chat.completion"]
    choices: Annotated[list[ChatChoice], Field(min_length=1)]
    usage: Usage
    prompt_token_ids: PromptIds
    prompt_logprobs: PromptLogprobs


class FunctionDelta(TypedDict):
    """A function's name, or more of its arguments."""

    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    """The start of a tool call, with its id, or more of it."""

    index: Count
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


class ChatDelta(TypedDict):
    """A chunk's addition to a message; empty in a choice's last chunk."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallDelta]]


class ChatChunkChoice(ChunkStopFields, ProbeFields):
    """A chunk's addition to one of `n` replies."""

    index: Count
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None


class ChatCompletionChunk(UsageFields, Reply):
    """A chunk of a streamed reply to a conversation."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    prompt_token_ids: NotRequired[Annotated[list[int], Field(description="In the first chunk, if requested.")]]


class CompletionLogprobs(TypedDict):
    """Log-probabilities of a text's tokens; the first token of an echoed prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(StopFields, ProbeFields):
    """One of `n` completions of a prompt."""

    index: Count
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    prompt_token_ids: PromptIds
    prompt_logprobs: PromptLogprobs


class Completion(Reply):
    """A reply with completions of raw prompts."""

    object: Literal["text_completion"]
    choices: Annotated[list[CompletionChoice], Field(min_length=1)]
    usage: Usage


class CompletionChunkChoice(ChunkStopFields, ProbeFields):
    """A chunk's addition to one of `n` completions."""

    index: Count
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    prompt_token_ids: NotRequired[Annotated[list[int], Field(description="In a choice's first chunk, if requested.")]]


class CompletionChunk(UsageFields, Reply):
    """A chunk of streamed completions."""

    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]


class PrefixCacheState(TypedDict):
    """Whether the prefix cache is on."""

    enabled: bool
    reason: Annotated[str | None, Field(description="Why it is off; null if it is on.")]


class ModelCard(TypedDict):
    """The served model."""

    id: str
    root: Annotated[str, Field(description="Location of the model: a folder, a hub id, or the embedded model's name.")]
    object: Literal["model"]
    created: int
    owned_by: str
    revision: str
    dtype: str
    quantization: Annotated[
        str | None,
        Field(
            description="Quantization of the weights: int8 by `quantize`, or the one in its config.json; null if none."
        ),
    ]
    device: str
    engine: str
    batch_invariant: bool
    prefix_cache: PrefixCacheState
    num_layers: Annotated[int, Field(ge=1)]
    d_model: Annotated[int, Field(ge=1)]
    context_length: Annotated[int | None, Field(ge=1, description="Null if only memory limits it.")]
    max_model_len: Annotated[int | None, Field(ge=1, description="The same, under vLLM's name.")]
    checks: Annotated[dict[str, Any], Field(description="Results of the checks at load time: batching, attention.")]


class ModelList(TypedDict):
    """The list of the one served model."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(TypedDict):
    """Whether the model is ready, or the stage of its start."""

    status: Literal["ok", "loading", "failed"]
    stage: str


class Version(TypedDict):
    """The server's version."""

    version: str


class Tokens(TypedDict):
    """The tokens of a text."""

    tokens: list[int]
    count: Count
    max_model_len: Annotated[int | None, Field(ge=1, description="Null if the model sets no limit.")]
    token_strs: Annotated[list[str] | None, Field(description="Null if not requested.")]


class TokenizerInfo(TypedDict):
    """The model's tokenizer, for clients that render and tokenize like the server."""

    tokenizer_class: str
    model_max_length: Annotated[int | None, Field(description="Null if the tokenizer sets no limit.")]
    vocab_size: Count
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    additional_special_tokens: list[str]
    added_tokens_decoder: Annotated[dict[str, str], Field(description="Added tokens, by token id.")]
    chat_template: str | None


class DetokenizedText(TypedDict):
    """The text of tokens."""

    prompt: str


class SessionEntry(TypedDict):
    """The summary of a session; `damage` says why it cannot be read, if so."""

    session_id: str
    uri: str
    rollouts: Count
    tokens: Count
    shards: Count
    bytes: Count
    keys: list[str]
    models: list[str]
    damage: str


class SessionList(TypedDict):
    """The sessions of the store."""

    object: Literal["list"]
    data: list[SessionEntry]


class RolloutEntry(TypedDict):
    """A stored rollout: its key, the location of its rows, and its labels."""

    rollout_id: str
    problem_id: str | None
    epoch: int | None
    turn: int | None
    shard: str
    row_start: int
    row_stop: int
    labels: dict[str, str | int | float | bool | None]


class SessionPage(SessionEntry):
    """A session with a page of its rollouts."""

    offset: Count
    items: list[RolloutEntry]


class RunRecord(TypedDict):
    """A run: settings that requests to its addresses share."""

    id: str
    object: Literal["run"]
    created: int
    path: Annotated[str, Field(description="Path of its addresses; the client replaces `{problem}` and `{epoch}`.")]
    settings: Annotated[dict[str, Any], Field(description="The settings, including defaults.")]


class RunList(TypedDict):
    """The runs of the store."""

    object: Literal["list"]
    data: list[RunRecord]


class AddedLabels(TypedDict):
    """The result of adding labels to a session's rollouts."""

    object: Literal["activations.labels"]
    session_id: str
    changed: Annotated[Count, Field(description="Number of rollouts with a new or changed label.")]
    same: Annotated[Count, Field(description="Number of rollouts that already had all labels.")]
    unknown: Annotated[list[str], Field(description="Ids that are not rollouts of the session.")]


class SessionFile(TypedDict):
    """A file of a session: its path inside, and its size in bytes."""

    name: str
    size: Count


class SessionFiles(TypedDict):
    """The committed files of a session, ordered so that referenced files precede the files that reference them."""

    object: Literal["list"]
    data: list[SessionFile]


class DeletedSession(TypedDict):
    """A deleted session."""

    id: str
    object: Literal["activations.session"]
    deleted: Literal[True]
    bytes: Count


COMPONENT = "#/components/schemas/{model}"

HEALTH: dict[str, Any] = {
    "responses": {
        200: {"model": Health, "description": "The model is ready"},
        503: {"model": Health, "description": "The model is loading, or could not be loaded"},
    }
}
"""Arguments of `/health`, the only route without the error envelope."""


def documented(reply: Any, *, chunk: type | None = None, events: tuple[type, ...] = ()) -> dict[str, Any]:
    """Return a route's arguments that document its replies and errors.

    Args:
        reply: type of the reply.
        chunk: type of a chunk, if the reply may be streamed as server-sent events.
        events: types of events that are named by their `type`.
    """
    good: dict[str, Any] = {"model": reply, "description": "Successful reply"}
    if chunk is not None:
        data = {"anyOf": [_json_of(chunk, ErrorReply), {"const": "[DONE]"}]}
        good["content"] = _event("the last event's data is `[DONE]`", data=data)
    if events:
        good["content"] = _event("named by its `type`", event={"type": "string"}, data=_json_of(*events))
    return {"response_model": None, "responses": {200: good, **_errors()}}


def _json_of(*kinds: type) -> dict[str, Any]:
    """Return the schema of a text that contains JSON of one of the types."""
    either = [{"$ref": COMPONENT.format(model=kind.__name__)} for kind in kinds]
    return {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": either}}


def _event(about: str, **fields: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a stream, by the fields of an event."""
    described = f"With `stream: true`, an event; {about}."
    event = {"type": "object", "properties": fields, "required": [*fields], "description": described}
    return {"text/event-stream": {"schema": event}}


def complete_document(api: FastAPI, *chunks: type) -> None:
    """Add what FastAPI omits to an application's OpenAPI document: closed objects, and the types of chunks.

    Args:
        api: the application with all routes.
        chunks: types of the chunks and events of streams.
    """
    _, found = TypeAdapter.json_schemas(
        [(chunk.__name__, "serialization", TypeAdapter(chunk)) for chunk in chunks], ref_template=COMPONENT
    )
    schemas = api.openapi()["components"]["schemas"]
    schemas |= found["$defs"]
    for schema in schemas.values():
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)


def raw(media_type: str, **form: str) -> dict[str, Any]:
    """Return the arguments of a route that sends text; `form` adds to its schema."""
    content = {media_type: {"schema": {"type": "string", **form}}}
    return {
        "response_class": Response,
        "responses": {200: {"content": content, "description": "Successful reply"}, **_errors()},
    }


def _errors() -> dict[int | str, Any]:
    errors: dict[int | str, Any] = {s: {"model": ErrorReply, "description": text} for s, text in ERRORS.items()}
    # Without this, FastAPI would document its own 422, which no route sends.
    return {**errors, "4XX": {"model": ErrorReply, "description": "Any other error of the request"}}
