"""What replies look like, for `/openapi.json`: clients are generated from it, and fuzzers hold every reply against it.

These models only describe; replies are built where they are made (`chat`, `completions`, …) and are not passed through here.
`documented` turns a model into arguments of a route. Every error of every route is the one envelope.
"""

from typing import Any, Literal

from fastapi import Response
from pydantic import BaseModel, ConfigDict, Field

from roentgen.contract import ActivationReply
from roentgen.linear_probe import ScoreUnit

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


class Shape(BaseModel):
    """An object with these fields and no others."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Shape):
    """What went wrong, in OpenAI's words."""

    message: str
    type: Literal[
        "invalid_request_error",
        "authentication_error",
        "permission_error",
        "not_found_error",
        "rate_limit_error",
        "server_error",
        "service_unavailable_error",
    ]
    param: str | None
    code: str | None


class ErrorReply(Shape):
    """OpenAI's error envelope."""

    error: ErrorDetail


class Usage(Shape):
    """Tokens read and written."""

    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)
    total_tokens: int = Field(ge=0)


class ChosenRollout(ActivationReply):
    """The activations of one choice of several."""

    choice_index: int = Field(ge=0)


class RolloutList(Shape):
    """The activations of several choices."""

    session_id: str
    rollouts: list[ChosenRollout]


class ScoredToken(Shape):
    """A token and how likely it was."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenToken(ScoredToken):
    """A token of the reply, and what else was likely in its place."""

    top_logprobs: list[ScoredToken]


class ChatLogprobs(Shape):
    """How likely a reply's tokens were."""

    content: list[ChosenToken]
    refusal: None


class FunctionCall(Shape):
    """The function and its arguments, which are JSON unless the reply was cut."""

    name: str
    arguments: str


class MadeToolCall(Shape):
    """A call that the model makes."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(Shape):
    """What the model says; `content` is null if it only calls tools."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str = Field(default="", description="What it thought before; absent if it did not.")
    tool_calls: list[MadeToolCall] = Field(default=[], description="Absent if there are none.")


class ProbeScores(Shape):
    """What one probe gives a choice's tokens, from position `start` on; with several outputs, a list per token."""

    probe: str
    key: str
    label: str
    unit: ScoreUnit = Field(
        description="What a score is: log-odds, logits, a value of the label, or a score of no unit."
    )
    classes: list[str]
    n_prompt: int = Field(ge=1)
    start: int = Field(ge=0)
    scores: list[float] | list[list[float]]


class ChatChoice(Shape):
    """One of `n` replies."""

    index: int = Field(ge=0)
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    probes: list[ProbeScores] = Field(default=[], description="Present if asked for.")


class ChatCompletion(Shape):
    """A reply to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice] = Field(min_length=1)
    usage: Usage
    activations: ActivationReply | RolloutList | None = Field(default=None, description="Present if asked for.")


class CompletionLogprobs(Shape):
    """How likely a text's tokens were; the first token of an echoed prompt has no score."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(Shape):
    """One of `n` continuations of a prompt."""

    index: int = Field(ge=0)
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    probes: list[ProbeScores] = Field(default=[], description="Present if asked for.")


class Completion(Shape):
    """Continuations of raw prompts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice] = Field(min_length=1)
    usage: Usage
    activations: ActivationReply | RolloutList | None = Field(default=None, description="Present if asked for.")


class ModelCard(Shape):
    """The served model."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    revision: str
    dtype: str
    num_layers: int = Field(ge=1)
    d_model: int = Field(ge=1)
    context_length: int | None = Field(ge=1, description="Null if the model sets no limit: memory does.")
    checks: dict[str, Any] = Field(description="What was found when it was loaded: batching, attention.")


class ModelList(Shape):
    """The served models: one."""

    object: Literal["list"]
    data: list[ModelCard]


class ModelStructure(BaseModel):
    """The model's layers and hook points: where each is, which are missing and why."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model_name: str
    model_type: str
    architecture: str
    num_layers: int
    layer_access_pattern: str
    pre_attention_path: str | None
    pre_mlp_path: str | None
    hook_points: dict[str, str]
    missing: dict[str, str]


class Health(BaseModel):
    """Whether the model answers, or what stage its start is in."""

    model_config = ConfigDict(extra="allow")

    status: str
    stage: str


class Tokens(Shape):
    """A text's tokens."""

    tokens: list[int]
    count: int = Field(ge=0)
    max_model_len: int | None = Field(ge=1, description="Null if the model sets no limit.")
    token_strs: list[str] = Field(default=[], description="Present if asked for.")


class DetokenizedText(Shape):
    """The text of tokens."""

    prompt: str


class SessionEntry(Shape):
    """What a session of the activation store holds; `damage` says why it cannot be read, if so."""

    session_id: str
    uri: str
    damage: str
    rollouts: int = Field(ge=0)
    tokens: int = Field(ge=0)
    shards: int = Field(ge=0)
    bytes: int = Field(ge=0)
    keys: list[str]
    models: list[str]


class SessionList(Shape):
    """The sessions of the store."""

    object: Literal["list"]
    data: list[SessionEntry]


class RolloutEntry(Shape):
    """A stored rollout: its key, where its rows are, and its labels."""

    rollout_id: str
    problem_id: str | None
    epoch: int | None
    turn: int | None
    shard: str
    row_start: int
    row_stop: int
    labels: dict[str, str | int | float | bool | None] | None


class SessionPage(SessionEntry):
    """A session with a page of its rollouts."""

    offset: int = Field(ge=0)
    items: list[RolloutEntry]


class SessionFile(Shape):
    """A file of a session: its path inside, and its size in bytes."""

    name: str
    size: int = Field(ge=0)


class SessionFiles(Shape):
    """The committed files of a session: those that others name come before those that name them."""

    object: Literal["list"]
    data: list[SessionFile]


class DeletedSession(Shape):
    """A session that is gone."""

    id: str
    object: Literal["activations.session"]
    deleted: Literal[True]
    bytes: int = Field(ge=0)


HEALTH: dict[str, Any] = {
    "responses": {
        status: {"model": Health, "description": text}
        for status, text in (
            (200, "The model answers"),
            (503, "It does not yet, or it could not be loaded"),
        )
    }
}
"""The arguments of the one route without errors."""


def documented(reply: type[BaseModel], *, streams: bool = False) -> dict[str, Any]:
    """Return a route's arguments that document its replies and its errors.

    Args:
        reply: what a 200 carries.
        streams: whether it may come as server-sent events instead.
    """
    good: dict[str, Any] = {"model": reply, "description": "As asked"}
    if streams:
        events = (
            "With `stream: true`, an event: `data` is a JSON object, OpenAI's chunk, or an error in its envelope; "
            "the last event's is `[DONE]`."
        )
        event = {
            "type": "object",
            "properties": {"data": {"type": "string"}},
            "required": ["data"],
            "description": events,
        }
        good["content"] = {"text/event-stream": {"schema": event}}
    return {"response_model": None, "responses": {200: good, **_errors()}}


def binary(media_type: str) -> dict[str, Any]:
    """Return the arguments of a route that sends bytes."""
    content = {media_type: {"schema": {"type": "string", "format": "binary"}}}
    return {
        "response_class": Response,
        "responses": {200: {"content": content, "description": "As asked"}, **_errors()},
    }


def exposition() -> dict[str, Any]:
    """Return the arguments of the route that sends what Prometheus reads."""
    content = {"text/plain": {"schema": {"type": "string"}}}
    return {
        "response_class": Response,
        "responses": {200: {"content": content, "description": "As asked"}, **_errors()},
    }


def _errors() -> dict[int | str, Any]:
    errors: dict[int | str, Any] = {s: {"model": ErrorReply, "description": text} for s, text in ERRORS.items()}
    # Without this, FastAPI would document its own 422, which no route sends.
    return {**errors, "4XX": {"model": ErrorReply, "description": "Any other error of the request"}}
