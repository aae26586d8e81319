"""Log-probabilities in OpenAI's two shapes: chat's list of objects, and completions' four parallel lists."""

import re
from functools import lru_cache
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from serve_app.engines.protocol import TokenScore


def chat_logprobs(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], scores: list[TokenScore]) -> dict[str, Any]:
    """Spell a chat choice's `logprobs`: per token its text, bytes and logprob, and the most likely ones beside it."""

    def spell(token: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(tokenizer, token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}

    content = [
        {**spell(token, score.logprob), "top_logprobs": [spell(*pair) for pair in score.top]}
        for token, score in zip(token_ids, scores, strict=True)
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: PreTrainedTokenizerBase, token_ids: list[int], scores: list[TokenScore | None], start: int = 0
) -> dict[str, Any]:
    """Spell a completion choice's `logprobs`.

    Args:
        tokenizer: the model's.
        token_ids: the tokens, the prompt's first if it is echoed.
        scores: of each; None for the very first token of a prompt, which nothing predicts.
        start: offset of the first token in the text.
    """
    texts = [token_bytes(tokenizer, token).decode("utf-8", "replace") for token in token_ids]
    offsets, at = [], start
    for text in texts:
        offsets.append(at)
        at += len(text)
    top = [
        None
        if score is None or not score.top
        else {token_bytes(tokenizer, token).decode("utf-8", "replace"): logprob for token, logprob in score.top}
        for score in scores
    ]
    return {
        "tokens": texts,
        "token_logprobs": [None if score is None else score.logprob for score in scores],
        "top_logprobs": top if any(top) else None,
        "text_offset": offsets,
    }


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    return {character: byte for byte, character in bytes_to_unicode().items()}


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """Return the bytes that a token stands for; a character may span several tokens, none of which is text alone."""
    piece = tokenizer.convert_ids_to_tokens(token)
    if piece is None:
        return b""  # the model's vocabulary may be padded beyond the tokenizer's
    if found := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
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
