"""What can go wrong and is nobody's bug: the base of every error whose message is written for the person who asked."""


class RoentgenError(Exception):
    """An expected failure: one clear line that says what was asked, why it cannot be, and what is allowed."""
