"""Formats log-probabilities in OpenAI's two formats: a list of objects for chat, four parallel lists for completions.

A token may be a part of a character, which is not valid text. OpenAI writes its bytes, `\\xf0\\x9f` in chat and
`bytes:\\xf0\\x9f` in completions, where U+FFFD could not be a key of `top_logprobs`, because all such tokens would share it.
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
    """Format a chat choice's `logprobs`: each token's text, bytes and log-probability, and the most likely alternatives.

    Args:
        tokenizer: the model's tokenizer.
        token_ids: the token ids.
        scores: the tokens' scores.
        as_ids: whether to write tokens as `token_id:5` instead of their text.
    """

    def scored(token: int, logprob: float) -> ScoredToken:
        raw = token_bytes(tokenizer, token)
        return {"token": _token_text(token, raw, as_ids=as_ids), "logprob": _json_logprob(logprob), "bytes": list(raw)}

    content: list[ChosenToken] = [
        {**scored(token, score.logprob), "top_logprobs": [scored(*pair) for pair in score.top]}
        for token, score in zip(token_ids, scores, strict=True)
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], scores: Sequence[TokenScore], top: int
) -> PromptLogprobs:
    """Format a prompt's log-probabilities as vLLM does: per position, by token id, the token and the most likely ones.

    Args:
        tokenizer: the model's tokenizer.
        token_ids: the prompt.
        scores: scores of the tokens from the second on; the first has none.
        top: number of most likely tokens to return.
    """

    def scored(token: int, logprob: float, rank: int) -> PromptToken:
        text = token_bytes(tokenizer, token).decode("utf-8", "replace")
        return {"logprob": logprob, "rank": rank, "decoded_token": text}

    positions: list[dict[str, PromptToken] | None] = [None]
    for token, score in zip(token_ids[1:], scores, strict=True):
        best = [(other, logprob, rank) for rank, (other, logprob) in enumerate(score.top[:top], start=1)]
        places = {token: (score.logprob, score.rank or 1)} | {other: (p, rank) for other, p, rank in best}
        positions.append({str(other): scored(other, *place) for other, place in places.items()})
    return positions


class Offsets:
    """Computes the character offsets of tokens in a growing text.

    A token inside a character has the offset of that character; a token cut off by a stop string has the offset of the text's
    end. The text is decoded as the engine decodes it, so that the offsets match the text that is sent.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stream: TextStream, *, start: int = 0, min_tokens: int = 0
    ) -> None:
        """Start a text.

        Args:
            tokenizer: the model's tokenizer.
            stream: decodes the text.
            start: offset of its first character.
            min_tokens: number of tokens before a stop string may end the text.
        """
        self._tokenizer = tokenizer
        self._stream = stream
        self._start = start
        self._min_tokens = min_tokens
        self._n_tokens = 0
        special = tokenizer.added_tokens_decoder.items()
        self._silent = {token for token, added in special if added.special and added.content not in MARKERS}
        self._undecided: list[int] = []  # tokens whose text is incomplete

    def of(self, token_ids: Sequence[int]) -> list[int]:
        """Return the offsets of the next tokens."""
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
        """Return the offsets of the undecided tokens.

        Args:
            before: offset of the first one.
            text: their text; None if it is not decided yet.
        """
        if len(self._undecided) == 1:
            return [before]
        pieces = [b"" if token in self._silent else token_bytes(self._tokenizer, token) for token in self._undecided]
        raw = b"".join(pieces)
        if text is None or raw.decode("utf-8", "replace") == text:
            return [before + character_at(raw, at) for at in accumulate(map(len, pieces[:-1]), initial=0)]
        # The tokenizer decodes invalid bytes in its own way, so decode the tokens before each one.
        decode = self._stream.tokenizer.decode
        shorter = [decode(self._undecided[:n], skip_special_tokens=True) for n in range(len(self._undecided))]
        return [before + n_common(decoded, text) for decoded in shorter]


def completion_logprobs(
    tokenizer: PreTrainedTokenizerBase,
    token_ids: list[int],
    scores: list[TokenScore | None],
    offsets: Offsets,
    echoed: Sequence[int] = (),
    *,
    as_ids: bool = False,
) -> CompletionLogprobs:
    """Format a completion choice's `logprobs`, or a chunk's part of them.

    `top_logprobs` contains, at each position, the requested number of most likely tokens and the token itself.

    Args:
        tokenizer: the model's tokenizer.
        token_ids: the token ids, with the prompt's first if it is echoed.
        scores: the tokens' scores; None for the first token of a prompt, which is not predicted. A forced token has no
            log-probability either.
        offsets: offsets in the generated text.
        echoed: offsets of the prompt's tokens, if it is echoed.
        as_ids: whether to write tokens as `token_id:5` instead of their text.
    """

    def name_of(token: int) -> str:
        return _token_text(token, token_bytes(tokenizer, token), "bytes:", as_ids=as_ids)

    def top(token: int, score: TokenScore) -> dict[str, float]:
        found: dict[str, float] = {}
        # Different tokens may have the same text (SentencePiece also has bytes for letters); keep the most likely one.
        for other, logprob in (*score.top, (token, score.logprob)):
            name = name_of(other)
            found[name] = max(logprob, found.get(name, logprob))
        return found

    return {
        "tokens": [name_of(token) for token in token_ids],
        "token_logprobs": [None if score is None else _json_logprob(score.logprob) for score in scores],
        "top_logprobs": [
            None if score is None or score is FORCED else top(token, score)
            for token, score in zip(token_ids, scores, strict=True)
        ],
        "text_offset": [
            *split_byte_offsets(tokenizer, token_ids[: len(echoed)], echoed),
            *offsets.of(token_ids[len(echoed) :]),
        ],
    }


def _json_logprob(logprob: float) -> float | None:
    """Return a log-probability for JSON; None for a forced token."""
    return None if math.isnan(logprob) else logprob


def _token_text(token: int, raw: bytes, mark: str = "", *, as_ids: bool = False) -> str:
    """Return a token's text; if its bytes are not valid UTF-8, the mark and the escaped bytes."""
    if as_ids:
        return f"token_id:{token}"
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return mark + "".join(chr(byte) if 32 <= byte < 127 and byte != 92 else f"\\x{byte:02x}" for byte in raw)
