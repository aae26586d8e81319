"""Creates a `TokenizedText` from each of its three sources: raw text, token ids, and a rendered conversation.

The tokenizer is called once, for the whole text, as `AutoTokenizer` is. Writing its opening token into the text and leaving it
out of the call is not the same, because the beginning of a text may be tokenized differently (SentencePiece's `▁`). Tokens
that the tokenizer adds are part of the text that the model sees, and so of the text that is stored.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby, takewhile
from typing import Literal

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from roentgen.tokenized_text import Segment, TokenizedText

PROMPT, COMPLETION, ASSISTANT = "prompt", "completion", "assistant"
"""Roles of raw text, of its continuation, and of the reply in a conversation."""


_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""SentencePiece's format of a token that is a byte."""


@dataclass(frozen=True)
class RawText:
    """A raw prompt."""

    prompt: TokenizedText
    """The text as the model sees it, with everything the tokenizer adds around it."""
    own: slice
    """Position of the text itself in `prompt.text`."""

    @property
    def opened(self) -> "RawText":
        """The same without what the tokenizer adds at the end, for a text that continues."""
        stop = sum(offset < self.own.stop for offset in self.prompt.token_offsets) if self.own.stop else 0
        text, offsets = self.prompt.text[: self.own.stop], self.prompt.token_offsets[:stop]
        return RawText(_raw(text, self.prompt.token_ids[:stop], offsets), self.own)

    def cut(self, keep: int, side: Literal["left", "right"]) -> "RawText":
        """The same without its first or last tokens.

        Args:
            keep: number of tokens to keep; if it is larger than the text, nothing is removed.
            side: side to remove tokens from.
        """
        prompt = cut_prompt(self.prompt, keep, side)
        if side == "left":
            start = len(self.prompt.text) - len(prompt.text)
            own = slice(max(self.own.start - start, 0), max(self.own.stop - start, 0))
        else:
            own = slice(min(self.own.start, len(prompt.text)), min(self.own.stop, len(prompt.text)))
        return RawText(prompt, own)

    @property
    def echo(self) -> str:
        """The text that a reply with `echo` repeats: the text itself."""
        return self.prompt.text[self.own]

    @property
    def echo_offsets(self) -> list[int]:
        """Offset of each token in `echo`; tokens that the tokenizer added before the text have the offset 0."""
        return [min(max(at, self.own.start), self.own.stop) - self.own.start for at in self.prompt.token_offsets]


def cut_prompt(prompt: TokenizedText, keep: int, side: Literal["left", "right"]) -> TokenizedText:
    """Return a prompt without its first or last tokens and the text that they cover.

    Args:
        prompt: a prompt without a completion.
        keep: number of tokens to keep; if it is larger than the prompt, nothing is removed.
        side: side to remove tokens from.
    """
    n = len(prompt.token_ids)
    if keep >= n:
        return prompt
    first, stop = (n - keep, n) if side == "left" else (0, keep)
    offsets = [*prompt.token_offsets, len(prompt.text)]
    begin, end = offsets[first], offsets[stop]
    segments = [
        Segment(one.role, max(one.start, begin) - begin, min(one.stop, end) - begin)
        for one in prompt.segments
        if one.start < end and one.stop > begin
    ]
    return TokenizedText(
        text=prompt.text[begin:end],
        token_ids=prompt.token_ids[first:stop],
        token_offsets=[offset - begin for offset in prompt.token_offsets[first:stop]],
        segments=segments,
        n_prompt=keep,
    )


def tokenize_text(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = True) -> RawText:
    """Tokenize raw text.

    Args:
        tokenizer: the model's tokenizer.
        text: any text.
        add_special_tokens: whether the tokenizer adds tokens at the beginning or end of the text.
    """
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    token_ids = list(encoded["input_ids"])
    added = [sequence is None for sequence in encoded.sequence_ids(0)]
    n_opening = sum(takewhile(bool, added))
    if n_opening == len(added):  # the text has no token of its own: use the opening of another text
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
    return RawText(_raw(opening + text + "".join(pieces[n_opening:]), token_ids, offsets), own)


def split_byte_offsets(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], offsets: Sequence[int]) -> list[int]:
    """Return the offsets of tokens, where tokens that are bytes have the offsets of their characters.

    Some tokenizers give a run of bytes the offset of the first.

    Args:
        tokenizer: the model's tokenizer.
        token_ids: tokens of a text.
        offsets: offset of each token.
    """
    pieces = [str(piece) for piece in tokenizer.convert_ids_to_tokens(token_ids)]
    found = list(offsets)
    for (offset, is_byte), run in groupby(
        range(len(token_ids)), lambda place: (offsets[place], _BYTE.fullmatch(pieces[place]) is not None)
    ):
        places = list(run) if is_byte else []
        raw = b"".join(token_bytes(tokenizer, token_ids[place]) for place in places)
        for at, place in enumerate(places):
            found[place] = offset + character_at(raw, at)
    return found


def character_at(raw: bytes, at: int) -> int:
    """Return the index of the character that a byte belongs to; invalid bytes count as U+FFFD."""
    before, through = raw[:at].decode("utf-8", "replace"), raw[: at + 1].decode("utf-8", "replace")
    # A byte without a visible effect continues the character before it.
    return len(before) - 1 if before == through and at < len(raw) else n_common(before, through)


def n_common(one: str, other: str) -> int:
    """Return the number of leading characters that two texts have in common."""
    return sum(takewhile(bool, (a == b for a, b in zip(one, other, strict=False))))


def decode_tokens(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> RawText:
    """Decode token ids into the form that their text would have if it were tokenized.

    Decoding alone gives another form: SentencePiece's `▁` is a space after a special token, and nothing at the beginning of a
    text. So this searches for a text with these tokens; if there is none, it uses the form of decoding.
    """
    for text, special in _texts_of(tokenizer, token_ids):
        whole = tokenize_text(tokenizer, text, add_special_tokens=special)
        for raw in (whole, whole.opened):
            if raw.prompt.token_ids == token_ids:
                return RawText(raw.prompt, slice(0, len(raw.prompt.text)))
    text, offsets = decode(tokenizer.backend_tokenizer, token_ids)
    return RawText(_raw(text, token_ids, offsets), slice(0, len(text)))


def _texts_of(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> Iterator[tuple[str, bool]]:
    """Yield texts that may have these tokens, and whether the tokenizer adds special tokens to them."""
    added = [sequence is None for sequence in tokenizer("a").sequence_ids(0)]
    opening = tokenizer("a")["input_ids"][: sum(takewhile(bool, added))]
    closing = tokenizer("a")["input_ids"][len(added) - sum(takewhile(bool, reversed(added))) :]
    tokens_of = {False: token_ids}
    if (opening or closing) and token_ids[: len(opening)] == opening:
        own = token_ids[len(opening) :]
        tokens_of = {True: own[: -len(closing)] if closing and own[-len(closing) :] == closing else own, **tokens_of}
    for special, own in tokens_of.items():
        text = tokenizer.backend_tokenizer.decode(own, skip_special_tokens=False)
        yield (
            text.removeprefix(" "),
            special,
        )  # some tokenizers put a space before a text, and do not take it away again
        yield text, special


def tokenize_rendered(
    tokenizer: PreTrainedTokenizerBase, text: str, segments: list[Segment], *, add_special_tokens: bool = False
) -> TokenizedText:
    """Tokenize the output of a chat template.

    Args:
        tokenizer: the model's tokenizer.
        text: the template's output.
        segments: roles of its characters.
        add_special_tokens: whether the tokenizer adds tokens at the beginning or end of the text; templates write those
            themselves.
    """
    raw = tokenize_text(tokenizer, text, add_special_tokens=add_special_tokens)
    before = raw.own.start
    moved = [Segment(one.role, one.start + before, one.stop + before) for one in segments]
    return replace(raw.prompt, segments=moved)


def completed(
    tokenizer: PreTrainedTokenizerBase, prompt: TokenizedText, token_ids: list[int], role: str
) -> TokenizedText:
    """Append a completion's tokens and their text to a prompt.

    Args:
        tokenizer: the model's tokenizer.
        prompt: the prompt.
        token_ids: the completion's tokens.
        role: role of the completion's speaker.
    """
    words, offsets = decode(tokenizer.backend_tokenizer, token_ids, after=prompt.token_ids)
    start = len(prompt.text)
    return TokenizedText(
        text=prompt.text + words,
        token_ids=prompt.token_ids + token_ids,
        token_offsets=prompt.token_offsets + [start + offset for offset in offsets],
        segments=[*prompt.segments, Segment(role, start, start + len(words))],
        n_prompt=prompt.n_prompt,
    )


def decode(tokenizer: Tokenizer, token_ids: Sequence[int], after: Sequence[int] = ()) -> tuple[str, list[int]]:
    """Decode tokens, special tokens included.

    Args:
        tokenizer: the model's tokenizer.
        token_ids: tokens to decode.
        after: the tokens before them.

    Returns:
        The text, and the offset of each token in it. A token in the middle of a character has that character's offset.
    """
    decoder = Decoder(tokenizer, skip_special_tokens=False, after=after)
    text, offsets = "", []
    for token_id in token_ids:
        offsets.append(len(text))
        text += decoder.step(token_id)
    return text + decoder.rest(), offsets


class Decoder:
    """Decodes a text's tokens one at a time; returned text never changes.

    SentencePiece's byte tokens decode together: a character is withdrawn if invalid bytes follow it, and `tokenizers` raises
    an error then. Here the character stays, and the bytes after it are decoded separately.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool, after: Sequence[int] = ()) -> None:
        """Create a decoder.

        Args:
            tokenizer: the model's tokenizer.
            skip_special_tokens: whether special tokens are not part of the text.
            after: the tokens before the text.
        """
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._before: Sequence[int] | None = after  # until there is a first token
        self._pending: list[int] = []  # tokens that have not become text yet

    def step(self, token_id: int) -> str:
        """Add a token; returns the text that is complete now."""
        space = "" if self._before is None else space_lost(self._tokenizer, self._before, token_id)
        self._before = None
        try:
            piece = self._stream.step(self._tokenizer, token_id)
        except Exception as error:
            if "Invalid prefix" not in str(error):
                raise
            self._before = self._pending[-1:]
            stray, self._stream = self.rest(), DecodeStream(skip_special_tokens=self._skip)
            return space + stray + self.step(token_id)
        self._pending = [] if piece else [*self._pending, token_id]
        return space + (piece or "")

    def rest(self) -> str:
        """End the text: an incomplete character becomes U+FFFD, as in any decoder."""
        pending, self._pending = self._pending, []
        return str(self._tokenizer.decode(pending, skip_special_tokens=self._skip))


def space_lost(tokenizer: Tokenizer, before: Sequence[int], token_id: int) -> str:
    """Return the space that a token begins with and that decoding removes from the first token, or "".

    After a special token there is none: a text begins there.
    """
    special = {place for place, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    if not before or before[-1] in special or token_id in special:
        return ""
    last, alone = (tokenizer.decode([token], skip_special_tokens=False) for token in (before[-1], token_id))
    both = tokenizer.decode([before[-1], token_id], skip_special_tokens=False)
    return " " if alone and both == f"{last} {alone}" else ""


def _raw(text: str, token_ids: list[int], token_offsets: list[int]) -> TokenizedText:
    return TokenizedText(text, token_ids, token_offsets, [Segment(PROMPT, 0, len(text))], len(token_ids))


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    return {character: byte for byte, character in bytes_to_unicode().items()}


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """Return the bytes of a token. A character may span several tokens, none of which is valid text alone."""
    piece = tokenizer.convert_ids_to_tokens(token)
    if piece is None:
        return b""  # the model's vocabulary may be padded beyond the tokenizer's
    if found := _BYTE.fullmatch(piece):
        return bytes.fromhex(found[1])
    alphabet = _byte_of_character()
    if _is_byte_level(tokenizer) and all(character in alphabet for character in piece):
        return bytes(alphabet[character] for character in piece)
    text: str = tokenizer.decode([token])
    # A token that begins a word marks its space, which decoding alone removes.
    return (" " + text if piece.startswith("▁") and not text.startswith(" ") else text).encode()


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    core = tokenizer.backend_tokenizer
    return "ByteLevel" in f"{core.decoder!r}{core.pre_tokenizer!r}" or isinstance(core.pre_tokenizer, ByteLevel)
