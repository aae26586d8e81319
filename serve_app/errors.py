"""`RequestError`, the base class of every error that a client may see: a request or a model load that cannot be carried out.

Each layer raises its own subclass with an HTTP status, an error code and a parameter. `openai_api.errors` formats all of them
in OpenAI's envelope. Errors that no client sees are plain exceptions.
"""

import copyreg
from typing import Any

from roentgen.errors import RoentgenError

RETRY_AFTER_S = 2
"""Seconds after which a client may retry a request that the server cannot serve now."""


class RequestError(RoentgenError):
    """An error that is reported to the client.

    Attributes:
        status: the HTTP status.
        code: a machine-readable code, such as "context_length_exceeded".
        param: the request parameter that caused the error.
        prefix: text that a client's message begins with; a console shows the message without it.
        retry_after_s: for 429 and 503, seconds after which to retry.
    """

    status: int = 400
    code: str | None = None
    param: str | None = None
    prefix = ""
    retry_after_s: int | None = None

    @property
    def message(self) -> str:
        """The message for a client: what was requested, why it is not possible, and what is allowed."""
        # Messages of other libraries may quote invalid text, which cannot be encoded in a reply.
        return f"{self.prefix}{self}".encode("utf-8", "backslashreplace").decode()

    def payload(self) -> dict[str, Any]:
        """Return the error as a dict, which can cross a Serve handle."""
        return {name: getattr(self, name) for name in ("status", "message", "param", "code", "retry_after_s")}

    def __reduce__(self) -> tuple[Any, ...]:
        # For pickling. By default Python calls the class with the message, but some subclasses take other arguments.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]
