"""Log-probabilities in OpenAI's two shapes: chat's list of objects, and completions' four parallel lists.

A token may be part of a character, and then it is no text. OpenAI spells its bytes, `\\xf0\\x9f` in chat and `bytes:\\xf0\\x9f`
in completions, where `top_logprobs` is keyed by the spelling and U+FFFD would stand for every such token.
"""

import math
from collections.abc import Sequence
from itertools import accumulate

from transformers import PreTrainedTokenizerBase

from serve_app.engines.markers import MARKERS
from serve_app.engines.protocol import FORCED, TokenScore
from serve_app.engines.text import TextStream
from serve_app.models.tokenization import character_at, n_common, split_byte_offsets, token_bytes
from serve_app.openai_api.schemas import (
    ChatLogprobs,
    ChosenToken,
    CompletionLogprobs,
    PromptLogprobs,
    PromptToken,
    ScoredToken,
)


def chat_logprobs(
    tokenizer: PreTrainedTokenizerBase, token_ids: list[int], scores: list[TokenScore], *, as_ids: bool = False
) -> ChatLogprobs:
    """Spell a chat choice's `logprobs`: per token its text, bytes and logprob, and the most likely ones beside it.

    Args:
        tokenizer: the model's.
        token_ids: the tokens.
        scores: of each.
        as_ids: whether tokens are spelled `token_id:5` and not by their text.
    """

    def display_name(token: int, logprob: float) -> ScoredToken:
        raw = token_bytes(tokenizer, token)
        return {"token": _spelled(token, raw, as_ids=as_ids), "logprob": _told(logprob), "bytes": list(raw)}

    content: list[ChosenToken] = [
        {**display_name(token, score.logprob), "top_logprobs": [display_name(*pair) for pair in score.top]}
        for token, score in zip(token_ids, scores, strict=True)
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], scores: Sequence[TokenScore], top: int
) -> PromptLogprobs:
    """Spell a prompt's scores as vLLM does: per position, by token id, the token itself and the most likely ones.

    Args:
        tokenizer: the model's.
        token_ids: the prompt.
        scores: of its tokens from the second on; nothing predicts the first.
        top: how many of the most likely ones to tell.
    """

    def display_name(token: int, logprob: float, rank: int) -> PromptToken:
        text = token_bytes(tokenizer, token).decode("utf-8", "replace")
        return {"logprob": logprob, "rank": rank, "decoded_token": text}

    spelled: list[dict[str, PromptToken] | None] = [None]
    for token, score in zip(token_ids[1:], scores, strict=True):
        best = [(other, logprob, rank) for rank, (other, logprob) in enumerate(score.top[:top], start=1)]
        places = {token: (score.logprob, score.rank or 1)} | {other: (p, rank) for other, p, rank in best}
        spelled.append({str(other): display_name(other, *place) for other, place in places.items()})
    return spelled


class Offsets:
    """Where the tokens of a growing text begin in it, in characters.

    A token in the middle of a character begins where that character does; one that a stop string has cut off begins where the
    text ends. The text is made here as an engine makes it, so that the offsets are those of the text that is sent.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stream: TextStream, *, start: int = 0, min_tokens: int = 0
    ) -> None:
        """Begin a text.

        Args:
            tokenizer: the model's.
            stream: makes the text.
            start: offset of its first character.
            min_tokens: tokens before which no stop string ends it.
        """
        self._tokenizer = tokenizer
        self._stream = stream
        self._start = start
        self._min_tokens = min_tokens
        self._n_tokens = 0
        special = tokenizer.added_tokens_decoder.items()
        self._silent = {token for token, added in special if added.special and added.content not in MARKERS}
        self._undecided: list[int] = []  # tokens whose text has only begun

    def of(self, token_ids: Sequence[int]) -> list[int]:
        """Return where the next tokens begin."""
        begins: list[int] = []
        for n_read, token in enumerate(token_ids, start=1):
            self._n_tokens += 1
            before = len(self._stream.text)
            self._stream.push(token, may_stop=self._n_tokens >= self._min_tokens)
            self._undecided.append(token)
            if new := self._stream.text[before:]:
                begins += self._within(before, new)[len(begins) - n_read :]
                self._undecided = []
        if n_left := len(token_ids) - len(begins):
            begins += self._within(len(self._stream.text), None)[-n_left:]
        end = len(self._stream.text)
        return [self._start + (min(at, end) if self._stream.stopped else at) for at in begins]

    def _within(self, before: int, text: str | None) -> list[int]:
        """Return where the undecided tokens begin.

        Args:
            before: where the first of them does.
            text: what they are together; None if that is not decided yet.
        """
        if len(self._undecided) == 1:
            return [before]
        spelled = [b"" if token in self._silent else token_bytes(self._tokenizer, token) for token in self._undecided]
        raw = b"".join(spelled)
        if text is None or raw.decode("utf-8", "replace") == text:
            return [before + character_at(raw, at) for at in accumulate(map(len, spelled[:-1]), initial=0)]
        # The tokenizer has another way with bytes that are no character: what it makes of the tokens before one tells.
        decode = self._stream.tokenizer.decode
        shorter = [decode(self._undecided[:n], skip_special_tokens=True) for n in range(len(self._undecided))]
        return [before + n_common(said, text) for said in shorter]


def completion_logprobs(
    tokenizer: PreTrainedTokenizerBase,
    token_ids: list[int],
    scores: list[TokenScore | None],
    offsets: Offsets,
    echoed: Sequence[int] = (),
    *,
    as_ids: bool = False,
) -> CompletionLogprobs:
    """Spell a completion choice's `logprobs`, or a chunk's part of them.

    `top_logprobs` has, at each position, the most likely tokens as many as were asked for, and the token itself.

    Args:
        tokenizer: the model's.
        token_ids: the tokens, the prompt's first if it is echoed.
        scores: of each; None for the very first token of a prompt, which nothing predicts. A token that nobody chose has none
            either.
        offsets: of the generated text so far.
        echoed: offsets of the prompt's tokens, if it is echoed.
        as_ids: whether tokens are spelled `token_id:5` and not by their text.
    """

    def display_name(token: int) -> str:
        return _spelled(token, token_bytes(tokenizer, token), "bytes:", as_ids=as_ids)

    def top(token: int, score: TokenScore) -> dict[str, float]:
        found: dict[str, float] = {}
        # Even whole tokens may have one spelling (SentencePiece has letters as bytes, too): the most likely stands for it.
        for other, logprob in (*score.top, (token, score.logprob)):
            name = display_name(other)
            found[name] = max(logprob, found.get(name, logprob))
        return found

    return {
        "tokens": [display_name(token) for token in token_ids],
        "token_logprobs": [None if score is None else _told(score.logprob) for score in scores],
        "top_logprobs": [
            None if score is None or score is FORCED else top(token, score)
            for token, score in zip(token_ids, scores, strict=True)
        ],
        "text_offset": [
            *split_byte_offsets(tokenizer, token_ids[: len(echoed)], echoed),
            *offsets.of(token_ids[len(echoed) :]),
        ],
    }


def _told(logprob: float) -> float | None:
    """Return a log-probability as JSON has it; None for a token that nobody chose."""
    return None if math.isnan(logprob) else logprob


def _spelled(token: int, raw: bytes, mark: str = "", *, as_ids: bool = False) -> str:
    """Return the text that a token's bytes are; if they are none, a mark and the bytes, those of ASCII as they are."""
    if as_ids:
        return f"token_id:{token}"
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return mark + "".join(chr(byte) if 32 <= byte < 127 and byte != 92 else f"\\x{byte:02x}" for byte in raw)
