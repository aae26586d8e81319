"""A text with its tokens, as a model was fed it.

The server's routes, `roentgen capture`, transcripts and the store share this type, so that the same text is stored in the
same form however it was submitted. `serve_app.models.tokenization` creates it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from roentgen.contract import count_rows

_SENTENCE_END = re.compile(r"[.!?](?=\s)|(?<![.!?\n])\n+")


def token_texts(text: str, offsets: Sequence[int]) -> list[str]:
    """Return the text of every token; of the tokens of one character, all but the first are empty.

    Args:
        text: the whole text.
        offsets: the index of each token's first character.
    """
    starts = [int(offset) for offset in offsets]
    return [text[start:stop] for start, stop in zip(starts, [*starts[1:], len(text)], strict=True)] if starts else []


def sentence_ends(text: str, ends: Int[np.ndarray, "tokens"], begins: int = 0) -> list[int]:
    """Return the tokens with which a sentence, or a line, has ended.

    Args:
        text: what they are tokens of.
        ends: the character behind each token, `[tokens]`.
        begins: the character to begin at.
    """
    found = np.searchsorted(ends, [match.end() for match in _SENTENCE_END.finditer(text, begins)])
    return [
        place for place in dict.fromkeys(found.tolist()) if place < len(ends)
    ]  # the first token that reaches so far


@dataclass(frozen=True)
class Segment:
    """Characters `[start, stop)` of a text with one role."""

    role: str
    start: int
    stop: int


@dataclass(frozen=True)
class TokenizedText:
    """A prompt, or a prompt and its completion."""

    text: str
    """The text as fed to the model, including special tokens."""
    token_ids: list[int]
    """Its tokens, including a completion's final one."""
    token_offsets: list[int]
    """Index of each token's first character in `text`; a token inside a character begins where the character does."""
    segments: list[Segment]
    """The role of each range of characters; tools that answer together share one segment."""
    n_prompt: int
    """Number of tokens in the prompt. A prompt and its completion never share a token."""

    @property
    def n_completion(self) -> int:
        """Tokens in the completion."""
        return len(self.token_ids) - self.n_prompt

    @property
    def n_rows(self) -> int:
        """Rows of a full capture; a completion's final token has none, because it is never fed to the model."""
        return count_rows(self.n_prompt, self.n_completion)
