"""The OpenAI error envelope, and the errors that become one.

Any failure a client can see is a `RequestError`. Raised in a replica, it crosses the Serve handle as data (`payload`),
because an exception would cross it wrapped in Ray's own, with a traceback that is no client's business; in the ingress it is
an `ApiError`, which becomes an HTTP status and a JSON body.
"""

import re
from collections.abc import Iterable
from typing import Any

from roentgen.store import NonFiniteRowsError, StoreError
from roentgen.strict_json import MAX_FIELD, JsonError
from serve_app.errors import RequestError
from serve_app.openai_api.schemas import ErrorReply, ErrorType

MAX_REASON = 500
"""Characters of an unexpected error that a client is told."""

NOT_AGAIN = frozenset({"non_finite_logits", "non_finite_rows"})
"""Codes of 5xx errors that would come again: OpenAI's clients are told not to repeat the request."""


class ApiError(RequestError):
    """An error that says at each place where it is raised what it means to a client; and how every one is written."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def kind(self) -> ErrorType:
        """OpenAI's `type` for the status."""
        kinds: dict[int, ErrorType] = {
            401: "authentication_error",
            403: "permission_error",
            404: "not_found_error",
            429: "rate_limit_error",
            503: "service_unavailable_error",
        }
        return kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> ErrorReply:
        """Return the envelope, as the client gets it."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Return the headers that go with it."""
        if self.code in NOT_AGAIN:
            return {"x-should-retry": "false"}
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> "ApiError":
        """Undo `payload`."""
        return cls(**payload)


def enumerated(names: Iterable[str]) -> str:
    """Write names one after another, the first ten of many."""
    listed = list(names)
    return ", ".join(listed[:10]) + (f" and {len(listed) - 10} more" if len(listed) > 10 else "")


def refused(param: str, reason: str, code: str | None = None) -> ApiError:
    """Refuse a request for one of its parameters."""
    return ApiError(400, f"{param}: {reason}", param=param, code=code)


def internal_error(error: BaseException) -> ApiError:
    """Spell a failure of the server's own code: a client that tries again would only meet it again."""
    return ApiError(500, f"internal error: {type(error).__name__}: {error}"[:MAX_REASON], code="internal_error")


def from_store(error: StoreError, code: str) -> ApiError:
    """Write a failure of the store: a bug or a disk, but for rows that the model made."""
    if isinstance(error, NonFiniteRowsError):
        return ApiError(500, f"activations: {error}", param="activations", code="non_finite_rows")
    return ApiError(500, str(error), code=code)


INVALID_TEXT = "invalid_text"
"""The code of a text that no model can read. To an evaluation it is one problem's fault; other 400s are everybody's."""


def from_json(error: JsonError) -> ApiError:
    """Turn what is wrong with a body's JSON into a 400."""
    code = INVALID_TEXT if error.no_text else None
    return ApiError(400, f"{error.field or 'the body'}: {error.reason}", param=error.field, code=code)


_ALTERNATIVES = ("tuple[", "literal[", "function-", "list[", "probe-")
_TYPES = ("str", "int", "float", "bool")


def from_validation(errors: list[Any]) -> ApiError:
    """Turn pydantic's errors about a request's body into a 400 that names the first parameter at fault."""
    first = errors[0]
    path = [str(part) for part in first["loc"] if part != "body"]
    # Unions add the name of the alternative tried; a client knows only the field.
    if len(path) > 1 and path[-1] in _TYPES and first["type"] == f"{path[-1].replace('str', 'string')}_type":
        path.pop()
    param = ".".join(part for part in path if not part.startswith(_ALTERNATIVES))[:MAX_FIELD] or None
    if first["type"] == "missing" and not path:
        return ApiError(400, "the body is empty; send a JSON object")
    if not path and first["type"] in ("model_attributes_type", "model_type"):
        return ApiError(400, "the body is not a JSON object; send one, with Content-Type: application/json")
    if first["type"] == "extra_forbidden":
        return ApiError(
            400, f"{param} is unknown or not supported by this server", param=param, code="unsupported_parameter"
        )
    reason = first["msg"].removeprefix("Value error, ")
    # What parameters are to each other is checked on the whole body; the message then begins with the name of one of them.
    if param is None and (found := re.match(r"([a-z_][a-z0-9_.]*): ", reason)):
        param, reason = found[1], reason[found.end() :]
    if first["type"] == "unsupported_value":
        return ApiError(
            400, f"{param}: {reason} (given: {str(first['input'])[:80]!r})", param=param, code="unsupported_value"
        )
    given = "" if first["type"] in ("missing", "value_error") else f" (given: {str(first.get('input'))[:80]!r})"
    return ApiError(400, f"{param}: {reason}{given}" if param else reason, param=param)
