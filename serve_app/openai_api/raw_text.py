"""From raw text to tokens: those that the model's tokenizer gives, and where they are in the text that the model sees.

The tokenizer is asked once, for the whole text, as `AutoTokenizer` is: putting its opening token into the text and leaving it
out of the call is not the same, because what stands first in a text may be spelled otherwise (SentencePiece's `▁`).
"""

from dataclasses import dataclass
from itertools import takewhile

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RawText:
    """A text's tokens.

    Attributes:
        text: what the model sees: the text, and around it what the tokenizer adds.
        token_ids: its tokens.
        token_offsets: the first character of each token in `text`.
        own: where the text itself is in `text`.
    """

    text: str
    token_ids: list[int]
    token_offsets: list[int]
    own: slice

    @property
    def opened(self) -> "RawText":
        """The same without what the tokenizer adds at the end: a text that goes on."""
        stop = sum(offset < self.own.stop for offset in self.token_offsets) if self.own.stop else 0
        return RawText(self.text[: self.own.stop], self.token_ids[:stop], self.token_offsets[:stop], self.own)


def tokenized(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = True) -> RawText:
    """Tokenize a text.

    Args:
        tokenizer: the model's.
        text: anything.
        add_special_tokens: whether the tokenizer adds what begins, or ends, a text.
    """
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    token_ids = list(encoded["input_ids"])
    added = [sequence is None for sequence in encoded.sequence_ids(0)]
    n_opening = sum(takewhile(bool, added))
    if n_opening == len(added):  # no token is the text's own: what begins a text is what begins another one
        n_opening = sum(takewhile(bool, (n is None for n in tokenizer("a").sequence_ids(0)))) if added else 0
    pieces = [
        str(tokenizer.convert_ids_to_tokens(token)) if new else "" for token, new in zip(token_ids, added, strict=True)
    ]
    opening = "".join(pieces[:n_opening])
    own = slice(len(opening), len(opening) + len(text))
    offsets, at = [], 0
    for place, (new, piece, (start, _)) in enumerate(zip(added, pieces, encoded["offset_mapping"], strict=True)):
        at = max(at, own.stop) if place >= n_opening and new else at
        offsets.append(at if new else own.start + start)
        at += len(piece)
    return RawText(opening + text + "".join(pieces[n_opening:]), token_ids, offsets, own)
