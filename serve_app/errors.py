"""Why a request cannot be carried out, or a model not be served: the base of every error that a client may see.

Whatever layer finds the reason raises a subclass, which says what it means to a client: a status, a code, a parameter.
`openai_api.errors` writes them all in OpenAI's envelope. An error that no client sees is a plain exception.
"""

import copyreg
from typing import Any

from roentgen.errors import RoentgenError

RETRY_AFTER_S = 2
"""When to try again what the server cannot do just now."""


class RequestError(RoentgenError):
    """An error of a client, or one that a client has to be told.

    Attributes:
        status: the HTTP status.
        code: a word for programs, such as "context_length_exceeded".
        param: the request's parameter at fault.
        prefix: what a client is told before the text, which has to make sense on a console too.
        retry_after_s: for 429 and 503, when to try again.
    """

    status: int = 400
    code: str | None = None
    param: str | None = None
    prefix = ""
    retry_after_s: int | None = None

    @property
    def message(self) -> str:
        """One sentence for a client: what was asked, why it cannot be, what is allowed."""
        # Errors of others quote what they were given, which need not be text, and a reply has to be.
        return f"{self.prefix}{self}".encode("utf-8", "backslashreplace").decode()

    def payload(self) -> dict[str, Any]:
        """Return the error as data, to cross a Serve handle."""
        return {name: getattr(self, name) for name in ("status", "message", "param", "code", "retry_after_s")}

    def __reduce__(self) -> tuple[Any, ...]:
        # It crosses processes. Python would call the class with its text, which is not what every one is made of.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]
