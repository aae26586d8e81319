"""What the page is told when something cannot be shown."""

from roentgen.errors import RoentgenError


class ViewError(RoentgenError):
    """A question that cannot be answered; the message says why.

    Attributes:
        status: of the HTTP reply.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status
