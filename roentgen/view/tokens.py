"""A rollout's text as the tokens that the model saw.

Nothing is tokenized again: the index has every token's id and its first character. A token is special that stands alone for
markup: what chat templates put around what is said is written `<…>` or `[…]` in the vocabularies of all families, as one token.
"""

import re
from typing import Any

import numpy as np
from jaxtyping import Int

from roentgen.tokenized_text import sentence_ends, token_texts
from roentgen.view.schemas import Tokens, TokenSegment

_SPECIAL = re.compile(r"<[|｜/]?[^\s<>|｜]+[|｜]?>|\[/?[A-Z_]+\]")


def tokens_of(row: dict[str, Any], start: int = 0, stop: int | None = None) -> Tokens:
    """Return tokens `[start, stop)` of a rollout.

    Args:
        row: its row of the index.
        start: the first.
        stop: the one behind the last; all if None.
    """
    ids, offsets, text = row["token_ids"], np.asarray(row["token_offsets"], dtype=np.int64), row["text"]
    total, n_prompt = len(ids), int(row["n_prompt"])
    start = min(max(0, start), total)
    stop = total if stop is None else min(max(start, stop), total)
    texts = token_texts(text, offsets.tolist())
    segments: list[TokenSegment] = [
        {"role": segment["role"], "start": int(first), "stop": int(last)}
        for segment in row["segments"]
        for first, last in [np.searchsorted(offsets, [segment["start"], segment["stop"]], side="left")]
    ]
    return {
        "total": total,
        "start": start,
        "n_prompt": n_prompt,
        "ids": list(ids[start:stop]),
        "texts": texts[start:stop],
        "special": [start + i for i, one in enumerate(texts[start:stop]) if _SPECIAL.fullmatch(one.strip())],
        "segments": [s for s in segments if s["stop"] > start and s["start"] < stop],
        "steps": _steps(text, offsets, n_prompt, start, stop),
    }


def _steps(text: str, offsets: Int[np.ndarray, "tokens"], n_prompt: int, start: int, stop: int) -> list[int]:
    """Return the tokens of the answer with which a sentence or a line ends."""
    if n_prompt >= len(offsets):
        return []
    ends = np.append(offsets[1:], len(text))
    return [place for place in sentence_ends(text, ends, int(offsets[n_prompt])) if start <= place < stop]
