"""`/v1/chat/completions`: what a request may say, and how a reply is spelled.

Unknown fields are refused, and so is every OpenAI parameter that this server does not honour yet: a parameter that is
silently ignored makes a result wrong without anyone noticing.
"""

import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from roentgen.contract import ActivationRequest


class TextPart(BaseModel):
    """One text part of a message's content."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


def _flatten(content: Any) -> Any:
    if isinstance(content, list):
        return "".join(TextPart.model_validate(part).text for part in content)
    return content


class Message(BaseModel):
    """One message of a conversation; content parts are joined."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_flatten)]
    name: str | None = None


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


def _stop_list(stop: Any) -> Any:
    return [] if stop is None else [stop] if isinstance(stop, str) else stop


class ChatRequest(BaseModel):
    """The body of a chat completion request; the fields are OpenAI's, `activations` is ours (docs/http.md)."""

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16), BeforeValidator(_stop_list)] = []
    n: Literal[1] = 1
    user: str | None = None
    metadata: dict[str, str] | None = None
    activations: ActivationRequest | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, body: Any) -> Any:
        # OpenAI's clients may send null for "not given".
        return {k: v for k, v in body.items() if v is not None} if isinstance(body, dict) else body

    @property
    def token_limit(self) -> int | None:
        """The most tokens to generate, under either of its names."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def completion(
    request_id: str,
    model: str,
    text: str,
    finish_reason: str,
    usage: dict[str, int],
    activations: dict[str, Any] | None,
) -> dict[str, Any]:
    """Spell a whole reply."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": None,
        "finish_reason": finish_reason,
    }
    reply = {**_envelope(request_id, model, "chat.completion"), "choices": [choice], "usage": usage}
    return reply | ({"activations": activations} if activations is not None else {})


def chunk(request_id: str, model: str, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    """Spell one piece of a streamed reply."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return {**_envelope(request_id, model, "chat.completion.chunk"), "choices": [choice]}


def last_chunk(request_id: str, model: str, extra: dict[str, Any]) -> dict[str, Any]:
    """Spell the piece after the last choice: usage, activations."""
    return {**_envelope(request_id, model, "chat.completion.chunk"), "choices": [], **extra}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Spell the token counts."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _envelope(request_id: str, model: str, kind: str) -> dict[str, Any]:
    return {"id": request_id, "object": kind, "created": int(time.time()), "model": model}
