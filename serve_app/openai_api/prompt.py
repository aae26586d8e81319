"""From messages to tokens: the model's own chat template, and where each role's words are in the text it makes.

The template is rendered to text first and tokenised with offsets, so that a stored rollout can say which characters each
token covers. Who said what is found by rendering the conversation one message longer each time: what a message adds is its
segment. A template that rewrites earlier messages breaks that; then the whole prompt is one segment.
"""

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from roentgen.store import Segment
from serve_app.openai_api.chat import Message
from serve_app.openai_api.errors import ApiError


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation.

    Attributes:
        text: what the model sees.
        token_ids: its tokens.
        token_offsets: the first character of each token in `text`.
        segments: which characters each role spoke.
        turn_start: the first token that is new in this turn: the last one of the last assistant message, which the turn
            before sampled but did not feed; 0 in a first turn.
    """

    text: str
    token_ids: list[int]
    token_offsets: list[int]
    segments: list[Segment]
    turn_start: int = 0


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], model: str) -> Prompt:
    """Render and tokenise a conversation, ready for the model's turn.

    Raises:
        ApiError: if the model has no chat template, or the template refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise ApiError(400, f"{model} has no chat template, so it cannot chat", param="messages")
    turns = [{"role": "system" if m.role == "developer" else m.role, "content": m.content} for m in messages]
    try:
        text = _apply(tokenizer, turns, start_reply=True)
    except TemplateError as error:
        raise ApiError(400, f"messages: {model}'s chat template refuses them: {error}", param="messages") from error
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = [start for start, _ in encoded["offset_mapping"]]
    segments = _segments(tokenizer, turns, text)
    return Prompt(text, list(encoded["input_ids"]), offsets, segments, _turn_start(turns, segments, text, offsets))


def _apply(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], *, start_reply: bool) -> str:
    rendered: Any = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=start_reply)
    return str(rendered)


def _segments(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], text: str) -> list[Segment]:
    segments: list[Segment] = []
    start = 0
    for count, turn in enumerate(turns, start=1):
        try:
            so_far = _apply(tokenizer, turns[:count], start_reply=False)
        except TemplateError:  # some templates refuse a conversation that stops here
            return [Segment("prompt", 0, len(text))]
        if not text.startswith(so_far) or len(so_far) < start:
            return [Segment("prompt", 0, len(text))]
        segments.append(Segment(turn["role"], start, len(so_far)))
        start = len(so_far)
    return segments


def _turn_start(turns: list[dict[str, str]], segments: list[Segment], text: str, offsets: list[int]) -> int:
    """Return the token that covers the last character of the last assistant message's own words.

    If they cannot be found in what the template made of them, it is the message's first token, or the first of all: rather
    kept twice than not at all.
    """
    if len(segments) != len(turns):
        return 0
    spoken = [(turn, segment) for turn, segment in zip(turns, segments, strict=True) if turn["role"] == "assistant"]
    if not spoken:
        return 0
    turn, segment = spoken[-1]
    words = turn["content"].strip()
    start = text.rfind(words, segment.start, segment.stop) if words else -1
    character = segment.start if start < 0 else start + len(words) - 1
    return max(0, bisect_right(offsets, character) - 1)
