"""`RoentgenError`, the base class of expected errors, whose messages are written for users."""


class RoentgenError(Exception):
    """An expected failure, with one line that says what was requested, why it is not possible, and what is allowed.

    Attributes:
        for_console: the message with a command's options, if the error's own text has a script's arguments instead.
    """

    for_console: str | None = None
