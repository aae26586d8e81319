"""Sends one chat request and classifies its failure: this problem's, or one that all problems share.

The SDK retries transient errors (429, 5xx, lost connections) for about a minute, with exponential backoff and jitter, and
honors `Retry-After`. Errors handled here have already been retried.
"""

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from openai import APIConnectionError, APIError, APIStatusError, APITimeoutError, AsyncOpenAI
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from eval_jobs.endpoint import Endpoint, FatalRequestError, server_message
from eval_jobs.tools import ModelToolCall
from roentgen.errors import RoentgenError

CONFIGURATION_ERRORS = frozenset({400, 401, 403, 404, 422})
"""HTTP statuses caused by the request's parameters, which all problems share."""

PROBLEM_ERRORS = frozenset({"context_length_exceeded", "request_too_large", "invalid_text"})
"""Error codes of a 400 that the problem causes: its text is too long or not valid Unicode."""

KEPT_FIELDS = ("role", "content", "reasoning_content", "tool_calls")
"""Fields of a reply's message that are recorded and sent back in the next turn."""


class ProblemFailedError(RoentgenError):
    """The problem got no answer; the message says why."""


@dataclass(frozen=True)
class ModelReply:
    """The reply to a request."""

    message: dict[str, Any]
    """The assistant's message."""
    finish_reason: str | None
    """Why the model stopped."""
    tool_calls: list[ModelToolCall]
    """Tool calls that it requests."""
    prompt_tokens: int
    """Tokens of the prompt."""
    cached_tokens: int
    """Prompt tokens that the server reports as cached; 0 if it reports none."""
    completion_tokens: int
    """Tokens generated."""
    seconds: float
    """Wall time, retries included."""
    activations: Any
    """The reply's `activations`, not yet validated."""


class _Message(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: str = "assistant"
    content: str | None = None
    tool_calls: list[ModelToolCall] | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _PromptTokensDetails(BaseModel):
    cached_tokens: int | None = None


class _Usage(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptTokensDetails | None = None


class _Reply(BaseModel):
    """The fields of a reply that are used. The SDK does not validate its own types, and compatible servers differ."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None
    activations: Any = None


async def send_chat_request(client: AsyncOpenAI, endpoint: Endpoint, parameters: dict[str, Any]) -> ModelReply:
    """Request a chat completion.

    Raises:
        ProblemFailedError: if the request got no usable answer.
        FatalRequestError: if every other request would fail in the same way.
    """
    started = time.monotonic()
    try:
        async with asyncio.timeout(endpoint.timeout):  # includes all retries
            raw = await client.chat.completions.with_raw_response.create(**parameters)
        return _read(_Reply.model_validate_json(raw.content), time.monotonic() - started)
    except (TimeoutError, APITimeoutError) as error:
        raise ProblemFailedError(f"no answer within {endpoint.timeout:g} s (--request-timeout)") from error
    except APIConnectionError as error:
        await _check_alive(client, endpoint)
        raise ProblemFailedError(f"the connection was lost: {error.__cause__ or error}") from error
    except APIStatusError as error:
        if error.status_code in CONFIGURATION_ERRORS and error.code not in PROBLEM_ERRORS:
            raise FatalRequestError(f"the server rejected the request: {server_message(error)}") from error
        raise ProblemFailedError(server_message(error)) from error
    except UnicodeEncodeError as error:  # raised by the SDK before anything is sent
        raise ProblemFailedError("a message contains an unpaired surrogate, which cannot be encoded") from error
    except ValidationError as error:  # a 200 that is not JSON, or JSON of another shape
        raise ProblemFailedError(f"the reply cannot be read: {error.errors()[0]['msg']}") from error


def _read(reply: _Reply, seconds: float) -> ModelReply:
    choice, usage = reply.choices[0], reply.usage or _Usage()
    details = usage.prompt_tokens_details or _PromptTokensDetails()
    said = choice.message.model_dump(exclude_none=True)
    return ModelReply(
        message={"content": None, **{name: said[name] for name in KEPT_FIELDS if name in said}},
        finish_reason=choice.finish_reason,
        tool_calls=choice.message.tool_calls or [],
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=details.cached_tokens or 0,
        completion_tokens=usage.completion_tokens,
        seconds=seconds,
        activations=reply.activations,
    )


async def _check_alive(client: AsyncOpenAI, endpoint: Endpoint) -> None:
    """Check whether a lost connection was caused by the problem or by the server.

    Raises:
        FatalRequestError: if the server does not answer.
    """
    try:
        await client.with_options(max_retries=len(endpoint.urls), timeout=endpoint.timeout).models.list()
    except APIConnectionError as error:
        raise FatalRequestError(f"the server at {endpoint.base_url} no longer answers") from error
    except APIError:
        return  # the server answers, even if with an error
