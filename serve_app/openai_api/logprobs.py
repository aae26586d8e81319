"""Log-probabilities in OpenAI's two shapes: chat's list of objects, and completions' four parallel lists."""

import codecs
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from serve_app.engines.markers import MARKERS
from serve_app.engines.protocol import TokenScore
from serve_app.models.tokenization import token_bytes
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

    def spell(token: int, logprob: float) -> ScoredToken:
        raw = token_bytes(tokenizer, token)
        return {"token": _spelled(token, raw, as_ids), "logprob": logprob, "bytes": list(raw)}

    content: list[ChosenToken] = [
        {**spell(token, score.logprob), "top_logprobs": [spell(*pair) for pair in score.top]}
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

    def spell(token: int, logprob: float, rank: int) -> PromptToken:
        text = token_bytes(tokenizer, token).decode("utf-8", "replace")
        return {"logprob": logprob, "rank": rank, "decoded_token": text}

    spelled: list[dict[str, PromptToken] | None] = [None]
    for token, score in zip(token_ids[1:], scores, strict=True):
        best = [(other, logprob, rank) for rank, (other, logprob) in enumerate(score.top[:top], start=1)]
        places = {token: (score.logprob, score.rank or 1)} | {other: (p, rank) for other, p, rank in best}
        spelled.append({str(other): spell(other, *place) for other, place in places.items()})
    return spelled


def _spelled(token: int, raw: bytes, as_ids: bool) -> str:
    return f"token_id:{token}" if as_ids else raw.decode("utf-8", "replace")


class Offsets:
    """Where the tokens of a growing text begin in it, in characters.

    A token in the middle of a character begins where that character does.
    """

    def __init__(self, start: int = 0) -> None:
        """Begin a text.

        Args:
            start: offset of its first character.
        """
        self._at = start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def of(self, raw: bytes) -> int:
        """Return where the next token begins.

        Args:
            raw: the bytes that the token adds to the text.
        """
        at = self._at
        self._at += len(self._decoder.decode(raw))
        return at


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
        scores: of each; None for the very first token of a prompt, which nothing predicts.
        offsets: of the generated text so far.
        echoed: offsets of the prompt's tokens, if it is echoed.
        as_ids: whether tokens are spelled `token_id:5` and not by their text.
    """
    spelled = [token_bytes(tokenizer, token) for token in token_ids]
    special = tokenizer.added_tokens_decoder.items()
    left_out = {token for token, added in special if added.special and added.content not in MARKERS}
    generated = list(zip(token_ids, spelled, strict=True))[len(echoed) :]
    texts = [_spelled(token, raw, as_ids) for token, raw in zip(token_ids, spelled, strict=True)]
    return {
        "tokens": texts,
        "token_logprobs": [None if score is None else score.logprob for score in scores],
        "top_logprobs": [
            None if score is None else _top(tokenizer, text, score, as_ids)
            for text, score in zip(texts, scores, strict=True)
        ],
        "text_offset": [*echoed, *(offsets.of(b"" if token in left_out else raw) for token, raw in generated)],
    }


def _top(tokenizer: PreTrainedTokenizerBase, text: str, score: TokenScore, as_ids: bool) -> dict[str, float]:
    found: dict[str, float] = {}
    for token, logprob in score.top:
        # Tokens that are parts of characters may have one text; the most likely of them stands for it.
        found.setdefault(_spelled(token, token_bytes(tokenizer, token), as_ids), logprob)
    return found | {text: score.logprob}
