"""How a stream says that its response has failed: an `error`, and the response as far as it was known.

OpenAI's clients raise an exception for an event with an error's envelope in it, and others read the fields beside it.
"""

from typing import Any

from serve_app.openai_api.errors import ApiError
from serve_app.openai_api.responses.schemas import ErrorEvent, ResponseError, StateEvent


def failure_events(error: ApiError, sequence_number: int, begun: dict[str, Any]) -> tuple[ErrorEvent, StateEvent]:
    """Return a stream's last events.

    Args:
        error: what has failed.
        sequence_number: of the first of them.
        begun: the response as the stream began with it.
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
