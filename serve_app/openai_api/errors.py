"""OpenAI's error envelope, and the conversion of other errors to it.

Every failure that a client may see is a `RequestError`. A replica returns it as data (`payload`), because Ray would wrap an
exception and add a traceback that clients must not see. The ingress converts it to an `ApiError`, with an HTTP status and a
JSON body.
"""

import re
from collections.abc import Iterable
from typing import Any

from roentgen.store import NonFiniteRowsError, StoreError
from roentgen.strict_json import MAX_FIELD, JsonError
from serve_app.errors import RequestError
from serve_app.openai_api.schemas import ErrorReply, ErrorType

MAX_REASON = 500
"""Maximum number of characters of an unexpected error's message."""

NOT_AGAIN = frozenset({"non_finite_logits", "non_finite_rows"})
"""Codes of 5xx errors that a retry would raise again; a header tells OpenAI's clients not to retry."""


class ApiError(RequestError):
    """An error whose status, code and parameter are given where it is raised. It also formats errors for the client."""

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
        """Return the JSON body."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Return the error's HTTP headers."""
        if self.code in NOT_AGAIN:
            return {"x-should-retry": "false"}
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> "ApiError":
        """Create an error from the result of `payload`."""
        return cls(**payload)


def enumerated(names: Iterable[str]) -> str:
    """Join names with commas; of more than ten, the first ten and the number of the others."""
    listed = list(names)
    return ", ".join(listed[:10]) + (f" and {len(listed) - 10} more" if len(listed) > 10 else "")


def refused(param: str, reason: str, code: str | None = None) -> ApiError:
    """Return a 400 for one of a request's parameters."""
    return ApiError(400, f"{param}: {reason}", param=param, code=code)


def internal_error(error: BaseException) -> ApiError:
    """Return a 500 for a failure of the server's own code."""
    return ApiError(500, f"internal error: {type(error).__name__}: {error}"[:MAX_REASON], code="internal_error")


def from_store(error: StoreError, code: str) -> ApiError:
    """Return a 500 for a failure of the store; non-finite rows have their own code."""
    if isinstance(error, NonFiniteRowsError):
        return ApiError(500, f"activations: {error}", param="activations", code="non_finite_rows")
    return ApiError(500, str(error), code=code)


INVALID_TEXT = "invalid_text"
"""Code of a text that cannot be encoded. An evaluation fails only that sample; other 400s concern all samples."""


def from_json(error: JsonError) -> ApiError:
    """Convert an error in a body's JSON to a 400."""
    code = INVALID_TEXT if error.no_text else None
    return ApiError(400, f"{error.field or 'the body'}: {error.reason}", param=error.field, code=code)


_ALTERNATIVES = ("tuple[", "literal[", "function-", "list[", "probe-")
_TYPES = ("str", "int", "float", "bool")


def from_validation(errors: list[Any]) -> ApiError:
    """Convert pydantic's errors about a request's body to a 400 that names the first invalid parameter."""
    first = errors[0]
    path = [str(part) for part in first["loc"] if part != "body"]
    # For unions, pydantic adds the name of the alternative, which clients do not know.
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
    # Validators of the whole body begin their message with the name of a parameter.
    if param is None and (found := re.match(r"([a-z_][a-z0-9_.]*): ", reason)):
        param, reason = found[1], reason[found.end() :]
    if first["type"] == "unsupported_value":
        return ApiError(
            400, f"{param}: {reason} (given: {str(first['input'])[:80]!r})", param=param, code="unsupported_value"
        )
    given = "" if first["type"] in ("missing", "value_error") else f" (given: {str(first.get('input'))[:80]!r})"
    return ApiError(400, f"{param}: {reason}{given}" if param else reason, param=param)
