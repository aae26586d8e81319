"""The events of a failed stream: an `error`, and the response with status `failed`.

OpenAI's clients raise an exception for an event with an error envelope; other clients read the event's own fields.
"""

from typing import Any

from serve_app.openai_api.errors import ApiError
from serve_app.openai_api.responses.schemas import ErrorEvent, ResponseError, StateEvent


def failure_events(error: ApiError, sequence_number: int, begun: dict[str, Any]) -> tuple[ErrorEvent, StateEvent]:
    """Return a stream's last events.

    Args:
        error: the error.
        sequence_number: number of the first event.
        begun: the response in the stream's first event.
    """
    kind: ResponseError = {"code": "invalid_prompt", "message": error.message}
    if error.status >= 500:
        kind["code"] = "server_error"
    elif error.status == 429:
        kind["code"] = "rate_limit_exceeded"
    failure: ErrorEvent = {
        "type": "error",
        "sequence_number": sequence_number,
        "code": error.code,
        "message": error.message,
        "param": error.param,
        "error": error.body()["error"],
    }
    failed: StateEvent = {
        "type": "response.failed",
        "sequence_number": sequence_number + 1,
        "response": {**begun, "status": "failed", "error": kind},  # type: ignore[typeddict-item]
    }
    return failure, failed
