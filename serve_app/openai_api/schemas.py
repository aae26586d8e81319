"""What replies are: each one declared once, here, built as declared, and documented so in `/openapi.json`.

A reply is a `TypedDict`: mypy checks it where it is built, pydantic describes it, and at run time it is a plain dict, which
crosses a Serve handle and becomes JSON at no further cost; a stream makes one for every token. A key that may be absent is
`NotRequired`; one that may be null says so. `documented` turns a declaration into arguments of a route. Every error of every
route is the one envelope.
"""

from typing import Annotated, Any, Literal, NotRequired

from fastapi import FastAPI, Response
from pydantic import Field, GetPydanticSchema, TypeAdapter
from typing_extensions import TypedDict

from roentgen.contract import ActivationReply, ProbeEffect
from roentgen.linear_probe import ScoreUnit
from serve_app.engines.protocol import FinishReason

ERRORS = {
    400: "The request cannot be carried out; `param` names what is wrong",
    401: "No valid API key",
    403: "The server's configuration does not allow it",
    404: "There is no such model, session or route",
    405: "The route has other methods",
    408: "Not finished within the server's time limit",
    409: "The session is being written",
    413: "The body is too large",
    429: "The queue is full; `Retry-After` says when to try again",
    500: "A bug, or a disk that is full",
    503: "The model is loading, could not be loaded, or its replica was lost",
}
"""Which statuses an error may have."""


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
    """What went wrong, in OpenAI's words."""

    message: str
    type: ErrorType
    param: str | None
    code: str | None


class ErrorReply(TypedDict):
    """OpenAI's error envelope."""

    error: ErrorDetail


class PromptTokensDetails(TypedDict):
    """Of the prompts' tokens."""

    cached_tokens: Annotated[Count, Field(description="Found in the prefix cache, and not read again.")]


class Usage(TypedDict):
    """Tokens read and written."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: Annotated[
        PromptTokensDetails | None, Field(description="null in a stream's chunks before all choices have ended.")
    ]


class ChosenRollout(ActivationReply):
    """The activations of one choice of several."""

    choice_index: Count


class RolloutList(TypedDict):
    """The activations of several choices."""

    session_id: str
    rollouts: list[Annotated[dict[str, Any], GetPydanticSchema(lambda _, handler: handler(ChosenRollout))]]


Activations = Annotated[dict[str, Any], GetPydanticSchema(lambda _, handler: handler(ActivationReply))] | RolloutList
"""Where a request's activations are: an `ActivationReply`, already dumped where it was made, or a list of them."""


class CaptureFields(TypedDict):
    """The part of a reply that a request for activations adds."""

    activations: NotRequired[Annotated[Activations, Field(description="Present if asked for.")]]


class Reply(CaptureFields):
    """What every generation's reply has, whole or a piece of it."""

    id: str
    created: int
    model: str


class UsageFields(TypedDict):
    """The part of a stream's last chunk that `include_usage` adds."""

    usage: NotRequired[Usage]


class ScoredToken(TypedDict):
    """A token and how likely it was."""

    token: str
    logprob: Annotated[float | None, Field(description="null for a marker that the model did not choose.")]
    bytes: list[int]


class ChosenToken(ScoredToken):
    """A token of the reply, and what else was likely in its place."""

    top_logprobs: list[ScoredToken]


class ChatLogprobs(TypedDict):
    """How likely a reply's tokens were."""

    content: list[ChosenToken]
    refusal: None


class FunctionCall(TypedDict):
    """The function and its arguments, which are JSON unless the reply was cut."""

    name: str
    arguments: str


class MadeToolCall(TypedDict):
    """A call that the model makes."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(TypedDict):
    """What the model says; `content` is null if it only calls tools."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[Annotated[str, Field(description="What it thought before; absent if it did not.")]]
    tool_calls: NotRequired[Annotated[list[MadeToolCall], Field(description="Absent if there are none.")]]


class ScoreAction(TypedDict):
    """What a probe's scores have done to a choice, and the token whose score decided it."""

    then: ProbeEffect
    position: Count
    score: float


class ProbeScores(TypedDict):
    """What one probe gives a choice's tokens, from position `start` on; with several outputs, a list per token."""

    probe: str
    key: str
    label: str
    classes: list[str]
    unit: Annotated[
        ScoreUnit, Field(description="What a score is: log-odds, logits, a value of the label, or a score of no unit.")
    ]
    n_prompt: Annotated[int, Field(ge=1)]
    start: Count
    scores: list[float] | list[list[float]]
    acted: NotRequired[Annotated[ScoreAction, Field(description="Present if its `stop_when` has come true.")]]


class ProbeFields(TypedDict):
    """The part of a choice that a request for probes adds."""

    probes: NotRequired[Annotated[list[ProbeScores], Field(description="Present if asked for.")]]


class StopFields(TypedDict):
    """The part of a choice that says what ended it, and which tokens it has; vLLM's, as `prompt_logprobs` is."""

    stop_reason: Annotated[
        int | str | None,
        Field(description="The stop string or stop token that ended it, if the request named it, or `probe:NAME`."),
    ]
    token_ids: Annotated[
        list[int] | None, Field(description="With `return_token_ids`, probes or rows: all that were generated.")
    ]


class ChunkStopFields(TypedDict):
    """The same of a chunk: the tokens since the last; `stop_reason` comes with `finish_reason`."""

    stop_reason: NotRequired[int | str | None]
    token_ids: NotRequired[list[int]]


class PromptToken(TypedDict):
    """How likely a token was at a position of the prompt, and its place among all tokens there, from 1."""

    logprob: float
    rank: Annotated[int, Field(ge=1)]
    decoded_token: str


PromptIds = Annotated[list[int] | None, Field(description="With `return_token_ids`, probes or rows.")]
PromptLogprobs = Annotated[
    list[dict[str, PromptToken] | None] | None,
    Field(description="With `prompt_logprobs`: per position, by token id, its own token and the most likely ones."),
]

ChatFinishReason = FinishReason | Literal["tool_calls"]


class ChatChoice(StopFields, ProbeFields):
    """One of `n` replies."""

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
    """The name of the function, or more of its arguments."""

    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    """A call begins, with its id, or goes on."""

    index: Count
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


class ChatDelta(TypedDict):
    """What a chunk adds to a message; the last of a choice adds nothing."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallDelta]]


class ChatChunkChoice(ChunkStopFields, ProbeFields):
    """What a chunk adds to one of `n` replies."""

    index: Count
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None


class ChatCompletionChunk(UsageFields, Reply):
    """A piece of a streamed reply to a conversation."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    prompt_token_ids: NotRequired[Annotated[list[int], Field(description="In the first chunk, if asked for.")]]


class CompletionLogprobs(TypedDict):
    """How likely a text's tokens were; the first token of an echoed prompt has no score."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(StopFields, ProbeFields):
    """One of `n` continuations of a prompt."""

    index: Count
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    prompt_token_ids: PromptIds
    prompt_logprobs: PromptLogprobs


class Completion(Reply):
    """Continuations of raw prompts."""

    object: Literal["text_completion"]
    choices: Annotated[list[CompletionChoice], Field(min_length=1)]
    usage: Usage


class CompletionChunkChoice(ChunkStopFields, ProbeFields):
    """What a chunk adds to one of `n` continuations."""

    index: Count
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    prompt_token_ids: NotRequired[Annotated[list[int], Field(description="In a choice's first chunk, if asked for.")]]


class CompletionChunk(UsageFields, Reply):
    """A piece of streamed continuations."""

    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]


class PrefixCacheState(TypedDict):
    """Whether prompts are read only from where they differ from earlier ones."""

    enabled: bool
    reason: Annotated[str | None, Field(description="Why not; null where it is on.")]


class ModelCard(TypedDict):
    """The served model."""

    id: str
    root: Annotated[
        str, Field(description="Where it was loaded from: a folder, a hub id, or the embedded model's name.")
    ]
    object: Literal["model"]
    created: int
    owned_by: str
    revision: str
    dtype: str
    quantization: Annotated[
        str | None,
        Field(
            description="How its weights are quantized: int8 by `quantize`, or as its config.json says; null if they are not."
        ),
    ]
    device: str
    engine: str
    batch_invariant: bool
    prefix_cache: PrefixCacheState
    num_layers: Annotated[int, Field(ge=1)]
    d_model: Annotated[int, Field(ge=1)]
    context_length: Annotated[int | None, Field(ge=1, description="Null if the model sets no limit: memory does.")]
    max_model_len: Annotated[int | None, Field(ge=1, description="The same, by vLLM's name.")]
    checks: Annotated[dict[str, Any], Field(description="What was found when it was loaded: batching, attention.")]


class ModelList(TypedDict):
    """The served models: one."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(TypedDict):
    """Whether the model answers, or what stage its start is in."""

    status: Literal["ok", "loading", "failed"]
    stage: str


class Version(TypedDict):
    """The server's version."""

    version: str


class Tokens(TypedDict):
    """A text's tokens."""

    tokens: list[int]
    count: Count
    max_model_len: Annotated[int | None, Field(ge=1, description="Null if the model sets no limit.")]
    token_strs: Annotated[list[str] | None, Field(description="Null if not asked for.")]


class TokenizerInfo(TypedDict):
    """The model's tokenizer, for clients that render and tokenize as the server does."""

    tokenizer_class: str
    model_max_length: Annotated[int | None, Field(description="Null if the tokenizer sets no limit.")]
    vocab_size: Count
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    additional_special_tokens: list[str]
    added_tokens_decoder: Annotated[dict[str, str], Field(description="Tokens beside the vocabulary, by their ids.")]
    chat_template: str | None


class DetokenizedText(TypedDict):
    """The text of tokens."""

    prompt: str


class SessionEntry(TypedDict):
    """What a session of the activation store holds; `damage` says why it cannot be read, if so."""

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
    """A stored rollout: its key, where its rows are, and its labels."""

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
    """A run: what requests to its addresses have in common."""

    id: str
    object: Literal["run"]
    created: int
    path: Annotated[str, Field(description="Of its addresses: `{problem}` and `{epoch}` stand for the client's.")]
    settings: Annotated[dict[str, Any], Field(description="What was given, and the defaults of what was not.")]


class RunList(TypedDict):
    """The runs of the store."""

    object: Literal["list"]
    data: list[RunRecord]


class AddedLabels(TypedDict):
    """What adding labels to a session's rollouts has done."""

    object: Literal["activations.labels"]
    session_id: str
    changed: Annotated[Count, Field(description="Rollouts that have a label now that they had not.")]
    same: Annotated[Count, Field(description="Rollouts that had them all.")]
    unknown: Annotated[list[str], Field(description="Ids of no rollout of the session.")]


class SessionFile(TypedDict):
    """A file of a session: its path inside, and its size in bytes."""

    name: str
    size: Count


class SessionFiles(TypedDict):
    """The committed files of a session: those that others name come before those that name them."""

    object: Literal["list"]
    data: list[SessionFile]


class DeletedSession(TypedDict):
    """A session that is gone."""

    id: str
    object: Literal["activations.session"]
    deleted: Literal[True]
    bytes: Count


COMPONENT = "#/components/schemas/{model}"

HEALTH: dict[str, Any] = {
    "responses": {
        200: {"model": Health, "description": "The model answers"},
        503: {"model": Health, "description": "It does not yet, or it could not be loaded"},
    }
}
"""The arguments of the one route without errors."""


def documented(reply: Any, *, chunk: type | None = None, events: tuple[type, ...] = ()) -> dict[str, Any]:
    """Return a route's arguments that document its replies and its errors.

    Args:
        reply: what a 200 carries.
        chunk: what an event carries, if the reply may come as server-sent events instead, or else an error.
        events: what one carries that is named by its `type`.
    """
    good: dict[str, Any] = {"model": reply, "description": "As asked"}
    if chunk is not None:
        data = {"anyOf": [_json_of(chunk, ErrorReply), {"const": "[DONE]"}]}
        good["content"] = _event("the last event's data is `[DONE]`", data=data)
    if events:
        good["content"] = _event("named by its `type`", event={"type": "string"}, data=_json_of(*events))
    return {"response_model": None, "responses": {200: good, **_errors()}}


def _json_of(*kinds: type) -> dict[str, Any]:
    """Describe a text that is JSON of one of some kinds."""
    either = [{"$ref": COMPONENT.format(model=kind.__name__)} for kind in kinds]
    return {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": either}}


def _event(about: str, **fields: dict[str, Any]) -> dict[str, Any]:
    """Describe a reply as a stream, by an event's fields."""
    described = f"With `stream: true`, an event; {about}."
    event = {"type": "object", "properties": fields, "required": [*fields], "description": described}
    return {"text/event-stream": {"schema": event}}


def complete_document(api: FastAPI, *chunks: type) -> None:
    """Add to an application's document what FastAPI leaves out: that objects have no other keys, and what streams carry.

    Args:
        api: the application, with all its routes.
        chunks: what the events of streams carry.
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
    """Return the arguments of a route that sends text, or what else `form` says."""
    content = {media_type: {"schema": {"type": "string", **form}}}
    return {
        "response_class": Response,
        "responses": {200: {"content": content, "description": "As asked"}, **_errors()},
    }


def _errors() -> dict[int | str, Any]:
    errors: dict[int | str, Any] = {s: {"model": ErrorReply, "description": text} for s, text in ERRORS.items()}
    # Without this, FastAPI would document its own 422, which no route sends.
    return {**errors, "4XX": {"model": ErrorReply, "description": "Any other error of the request"}}
