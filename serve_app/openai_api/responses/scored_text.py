"""Which tokens a stretch of a reply's text is made of.

A chat lists the scores of all of a reply's tokens; a response has them beside the words they make, without those of its
thoughts, its calls and the marks between. Tokens come before their text, which may be held back, so they are found by where
each begins.
"""

import codecs
from collections.abc import Sequence

from serve_app.openai_api.schemas import ChosenToken


class ScoredText:
    """The tokens of a reply, given out as their text is said."""

    def __init__(self) -> None:
        self._text = ""
        self._tokens: list[ChosenToken] = []
        self._starts: list[int] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._next = 0  # of the tokens, the first that has not been given out

    def add(self, tokens: Sequence[ChosenToken]) -> None:
        """Take the next tokens."""
        for token in tokens:
            self._tokens.append(token)
            self._starts.append(len(self._text))  # one in the middle of a character begins where that does
            self._text += self._decoder.decode(bytes(token["bytes"]))

    def find(self, words: str, after: str = "") -> int:
        """Return where words begin.

        Args:
            words: what to look for.
            after: what comes somewhere before it, if it is there.
        """
        floor = self._text.find(after) + len(after) if after in self._text else 0
        return max(self._text.find(words, floor), floor)

    def take(self, start: int, stop: int) -> list[ChosenToken]:
        """Return the tokens that begin in a stretch of the text and have not been given out; none before it will be."""
        first = self._next
        while first < len(self._starts) and self._starts[first] < start:
            first += 1
        self._next = first
        while self._next < len(self._starts) and self._starts[self._next] < stop:
            self._next += 1
        return self._tokens[first : self._next]
