"""Finds the tokens of a part of a reply's text.

A chat lists the log-probabilities of all tokens of a reply; a response lists them with each text, without those of reasoning,
calls and markers. Tokens arrive before their text, which may be held back, so they are found by their offsets.
"""

import codecs
from collections.abc import Sequence

from serve_app.openai_api.schemas import ChosenToken


class ScoredText:
    """The tokens of a reply, which are taken by ranges of the text."""

    def __init__(self) -> None:
        self._text = ""
        self._tokens: list[ChosenToken] = []
        self._starts: list[int] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._next = 0  # index of the first token that has not been taken

    def add(self, tokens: Sequence[ChosenToken]) -> None:
        """Add the next tokens."""
        for token in tokens:
            self._tokens.append(token)
            self._starts.append(len(self._text))  # a token inside a character has the character's offset
            self._text += self._decoder.decode(bytes(token["bytes"]))

    def find(self, words: str, after: str = "") -> int:
        """Return the offset of a text.

        Args:
            words: the text to find.
            after: a marker after which to search, if it occurs.
        """
        floor = self._text.find(after) + len(after) if after in self._text else 0
        return max(self._text.find(words, floor), floor)

    def take(self, start: int, stop: int) -> list[ChosenToken]:
        """Return the tokens that start in a range of the text and have not been taken; earlier tokens are skipped."""
        first = self._next
        while first < len(self._starts) and self._starts[first] < start:
            first += 1
        self._next = first
        while self._next < len(self._starts) and self._starts[self._next] < stop:
            self._next += 1
        return self._tokens[first : self._next]
