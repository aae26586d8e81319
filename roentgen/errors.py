"""What can go wrong and is nobody's bug: the base of every error whose message is written for the person who asked."""


class RoentgenError(Exception):
    """An expected failure: one clear line that says what was asked, why it cannot be, and what is allowed.

    Attributes:
        for_console: the line with a command's options, where the error's own text has a script's arguments in their place.
    """

    for_console: str | None = None
