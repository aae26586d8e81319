"""Decodes tokens to text as they arrive, and finds stop strings in it.

`tokenizers` decodes incrementally, because a character may span tokens. Emitted text cannot be withdrawn, so text that could
begin a stop string is held back until that is decided. Some tokenizers flag the markers of tool calls and of reasoning as
special tokens. They are text nevertheless, because replies are parsed by them.
"""

from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer

from serve_app.models.tokenization import Decoder


class TextStream:
    """The text of one growing completion.

    Attributes:
        tokenizer: the model's tokenizer.
        text: the decoded text, cut before a stop string, or after it if that is asked for.
        stopped_by: the stop string that has appeared, if one has.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...],
        markers: Mapping[int, str],
        after: Sequence[int] = (),
        *,
        include_stop: bool = False,
    ) -> None:
        """Create an empty text.

        Args:
            tokenizer: the model's tokenizer.
            stop: stop strings.
            markers: special tokens that are part of the text, with their text.
            after: the tokens before the completion.
            include_stop: whether the stop string that ends it is part of it.
        """
        self.tokenizer = tokenizer
        self._decoder = Decoder(tokenizer, skip_special_tokens=True, after=after)
        self._stop = stop
        self._include_stop = include_stop
        self._markers = markers
        self._sent = 0
        self.text = ""
        self.stopped_by: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string has appeared."""
        return self.stopped_by is not None

    def push(self, token_id: int, *, may_stop: bool = True) -> None:
        """Add a token.

        Args:
            token_id: the token.
            may_stop: whether a stop string that the token completes ends the completion. A stop string that was completed
                earlier is ordinary text.
        """
        if self.stopped:
            return
        if token_id in self._markers:
            piece = self._decoder.rest() + self._markers[token_id]
            self._decoder = Decoder(self.tokenizer, skip_special_tokens=True)
        else:
            piece = self._decoder.step(token_id)
        before = len(self.text)
        self.text += piece
        if not piece or not may_stop:
            return
        # Only a stop string that this piece completes ends the text; one that was completed earlier was not allowed to.
        found = [(at, stop) for stop in self._stop if (at := self.text.find(stop, max(0, before + 1 - len(stop)))) >= 0]
        if found:
            at, self.stopped_by = min(found)
            self.text = self.text[: at + len(self.stopped_by) if self._include_stop else at]

    def close(self) -> None:
        """End the completion: an incomplete character becomes U+FFFD, as in any decoder."""
        if not self.stopped:
            self.text += self._decoder.rest()

    def take(self, *, final: bool = False) -> str:
        """Return the text that has become certain since the last call; with `final`, all remaining text."""
        end = len(self.text) if final or self.stopped else len(self.text) - self._undecided()
        piece = self.text[self._sent : end]
        self._sent = max(self._sent, end)
        return piece

    def _undecided(self) -> int:
        """Return how many characters at the end could begin a stop string."""
        for length in range(min(len(self.text), max(map(len, self._stop), default=1) - 1), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self._stop):
                return length
        return 0
