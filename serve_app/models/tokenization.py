"""Makes a `TokenizedText`, from each of the three things that one can come from: raw text, token ids, a rendered conversation.

The tokenizer is asked once, for the whole text, as `AutoTokenizer` is: putting its opening token into the text and leaving it
out of the call is not the same, because what stands first in a text may be tokenized otherwise (SentencePiece's `▁`). What the
tokenizer adds is part of the text that the model sees, and so of the text that is stored.
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
"""Who speaks raw text, what continues it, and the reply in a conversation."""


_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""How SentencePiece writes a token that is a byte."""


@dataclass(frozen=True)
class RawText:
    """A raw prompt."""

    prompt: TokenizedText
    """What the model sees: the text, and around it what the tokenizer adds."""
    own: slice
    """Where the text itself is in `prompt.text`."""

    @property
    def opened(self) -> "RawText":
        """The same without what the tokenizer adds at the end: a text that continues."""
        stop = sum(offset < self.own.stop for offset in self.prompt.token_offsets) if self.own.stop else 0
        text, offsets = self.prompt.text[: self.own.stop], self.prompt.token_offsets[:stop]
        return RawText(_raw(text, self.prompt.token_ids[:stop], offsets), self.own)

    def cut(self, keep: int, side: Literal["left", "right"]) -> "RawText":
        """The same with the first or last tokens left out.

        Args:
            keep: how many tokens stay; more than there are leaves none out.
            side: where they are left out.
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
        """What a reply that repeats its prompt says: the text itself."""
        return self.prompt.text[self.own]

    @property
    def echo_offsets(self) -> list[int]:
        """The first character of each token in `echo`; what the tokenizer added before it begins where it does."""
        return [min(max(at, self.own.start), self.own.stop) - self.own.start for at in self.prompt.token_offsets]


def cut_prompt(prompt: TokenizedText, keep: int, side: Literal["left", "right"]) -> TokenizedText:
    """Return a prompt with its first or last tokens left out, and the text that they cover.

    Args:
        prompt: a prompt without a completion.
        keep: how many tokens stay; more than there are leaves none out.
        side: where they are left out.
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
    return RawText(_raw(opening + text + "".join(pieces[n_opening:]), token_ids, offsets), own)


def tell_bytes_apart(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], offsets: Sequence[int]) -> list[int]:
    """Return offsets in which tokens that are bytes have those of their characters.

    Some tokenizers give a run of bytes the offset of the first.

    Args:
        tokenizer: the model's.
        token_ids: of a text.
        offsets: where each begins.
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
    """Return which character the byte at a place belongs to; bytes that are none count as U+FFFD."""
    before, through = raw[:at].decode("utf-8", "replace"), raw[: at + 1].decode("utf-8", "replace")
    # A byte that changes nothing that can be seen goes on with the character before it.
    return len(before) - 1 if before == through and at < len(raw) else n_common(before, through)


def n_common(one: str, other: str) -> int:
    """Return how many characters two texts begin with alike."""
    return sum(takewhile(bool, (a == b for a, b in zip(one, other, strict=False))))


def decode_tokens(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> RawText:
    """Take token ids as they are, in the same form as the text that they are the tokens of.

    Decoding alone gives another form: SentencePiece's `▁` is a space behind a special token, and nothing at the beginning of a
    text. So a text is looked for whose tokens these are; where there is none, the form is that of decoding.
    """
    for text, special in _texts_of(tokenizer, token_ids):
        whole = tokenize_text(tokenizer, text, add_special_tokens=special)
        for raw in (whole, whole.opened):
            if raw.prompt.token_ids == token_ids:
                return RawText(raw.prompt, slice(0, len(raw.prompt.text)))
    text, offsets = decode(tokenizer.backend_tokenizer, token_ids)
    return RawText(_raw(text, token_ids, offsets), slice(0, len(text)))


def _texts_of(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> Iterator[tuple[str, bool]]:
    """Yield texts that may have these tokens, and whether the tokenizer is to add special tokens to them."""
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
    """Tokenize what a chat template made.

    Args:
        tokenizer: the model's.
        text: what the template made.
        segments: who speaks which of its characters.
        add_special_tokens: whether the tokenizer adds what begins, or ends, a text; templates write that themselves.
    """
    raw = tokenize_text(tokenizer, text, add_special_tokens=add_special_tokens)
    before = raw.own.start
    moved = [Segment(one.role, one.start + before, one.stop + before) for one in segments]
    return replace(raw.prompt, segments=moved)


def completed(
    tokenizer: PreTrainedTokenizerBase, prompt: TokenizedText, token_ids: list[int], role: str
) -> TokenizedText:
    """Add the tokens of a completion, and the text that they spell, to a prompt.

    Args:
        tokenizer: the model's.
        prompt: what was completed.
        token_ids: the completion's tokens.
        role: who spoke it.
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
    """Decode tokens with the special ones among them.

    Args:
        tokenizer: the model's.
        token_ids: what to decode.
        after: the tokens before them.

    Returns:
        The text, and the offset in it at which each token's characters begin; a token in the middle of a character begins where
        that character does.
    """
    decoder = Decoder(tokenizer, skip_special_tokens=False, after=after)
    text, offsets = "", []
    for token_id in token_ids:
        offsets.append(len(text))
        text += decoder.step(token_id)
    return text + decoder.rest(), offsets


class Decoder:
    """Decodes a text's tokens one at a time; what it has given is never changed.

    SentencePiece's byte tokens decode together: a character is taken back if bytes follow it that are none. `tokenizers` raises
    then. Here the character stays, and what follows it is decoded apart.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool, after: Sequence[int] = ()) -> None:
        """Begin a text.

        Args:
            tokenizer: the model's.
            skip_special_tokens: whether they are no part of the text.
            after: the tokens before it.
        """
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._before: Sequence[int] | None = after  # until there is a first token
        self._pending: list[int] = []  # tokens that have not become text yet

    def step(self, token_id: int) -> str:
        """Add a token; returns the text that has become whole."""
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
        """End the text: a character that has only begun becomes U+FFFD, as in any decoder."""
        pending, self._pending = self._pending, []
        return str(self._tokenizer.decode(pending, skip_special_tokens=self._skip))


def space_lost(tokenizer: Tokenizer, before: Sequence[int], token_id: int) -> str:
    """Return the space that a token begins with and that decoding takes from the first token of all, or nothing.

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
    """Return the bytes that a token stands for; a character may span several tokens, none of which is text alone."""
    piece = tokenizer.convert_ids_to_tokens(token)
    if piece is None:
        return b""  # the model's vocabulary may be padded beyond the tokenizer's
    if found := _BYTE.fullmatch(piece):
        return bytes.fromhex(found[1])
    alphabet = _byte_of_character()
    if _is_byte_level(tokenizer) and all(character in alphabet for character in piece):
        return bytes(alphabet[character] for character in piece)
    text: str = tokenizer.decode([token])
    # A piece that begins a word is written with a mark for its space, which decoding alone takes away.
    return (" " + text if piece.startswith("▁") and not text.startswith(" ") else text).encode()


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    core = tokenizer.backend_tokenizer
    return "ByteLevel" in f"{core.decoder!r}{core.pre_tokenizer!r}" or isinstance(core.pre_tokenizer, ByteLevel)
