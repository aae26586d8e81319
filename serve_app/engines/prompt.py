"""What a model is given: a text as it sees it, its tokens, and who spoke which characters."""

from dataclasses import dataclass

from roentgen.store import Segment


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation.

    Attributes:
        text: what the model sees.
        token_ids: its tokens.
        token_offsets: the first character of each token in `text`.
        segments: which characters each role spoke; tools that answer together share one.
        turn_start: the first token that is new in this turn: the last one of the last assistant message, which the turn
            before sampled but did not feed; 0 in a first turn.
        given: what the client sent, where the tokenizer adds something around it; None if that is all of `text`.
    """

    text: str
    token_ids: list[int]
    token_offsets: list[int]
    segments: list[Segment]
    turn_start: int = 0
    given: str | None = None

    @property
    def echo(self) -> str:
        """What a reply that repeats its prompt says: what the client sent."""
        return self.text if self.given is None else self.given

    @property
    def echo_offsets(self) -> list[int]:
        """The first character of each token in `echo`; what the tokenizer added before it begins where it does."""
        before = max(self.text.find(self.echo), 0)
        return [min(max(offset - before, 0), len(self.echo)) for offset in self.token_offsets]
