"""Splits generated text into reasoning, content and tool calls while it is generated.

Parts are returned as soon as they are certain, because text that has been sent to a client cannot be withdrawn. So a possible
start of a marker (`<think>`, `<tool_call>`) is held back until it is decided. A call starts once `{"name": …, "arguments": {`
has been read, and its arguments are streamed from there; a call whose keys have another order is read whole. A block that is
not a call is returned as text, unchanged. The same parser reads complete replies, so that streamed replies have the same
content. `ReplyParser` is a state machine with one method per state:

    possible -> _opening ---.
    started  -> _thinking <-'-> _after_thinking -> _content          <think> … </think>, then content
    none     -> _content
                _content <-> _block -> _arguments -> _rest_of_call -> _closing -> _content     a call, name first
                             _block -----------------------------------> _closing -> _content     a call, read whole
                             _block -> _content                                                   not a call
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ulid import ULID

from serve_app.engines.markers import CALL_END, CALL_START, THINK_END, THINK_START
from serve_app.openai_api.call_text import HEADER, Braces, parse_call
from serve_app.openai_api.schemas import AssistantMessage, MadeToolCall

Reasoning = Literal["started", "possible", "none"]
"""How generated text begins: inside the reasoning, possibly with `<think>`, or with content."""


@dataclass(frozen=True)
class ContentDelta:
    """More of the content."""

    text: str


@dataclass(frozen=True)
class ReasoningDelta:
    """More of the reasoning."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """The start of a tool call; the first one's index is 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    """More of a tool call's arguments, which are JSON."""

    index: int
    text: str


ReplyPart = ContentDelta | ReasoningDelta | ToolCallStart | ToolCallArguments


def reasoning_mode(template_source: str, prompt_text: str, prefill: str = "") -> Reasoning:
    """Return how generated text begins, from the model's chat template and the rendered prompt.

    Args:
        template_source: the template.
        prompt_text: the prompt.
        prefill: the start of the message that the reply continues, if it continues one.
    """
    if prefill.strip():
        return "started" if prefill.rfind(THINK_START) > prefill.rfind(THINK_END) else "none"
    prompt = prompt_text.rstrip()
    if prompt.endswith(THINK_START):
        return "started"
    return "possible" if THINK_END in template_source and not prompt.endswith(THINK_END) else "none"


def assemble(parts: list[ReplyPart]) -> AssistantMessage:
    """Assemble the parts of a complete reply into an assistant's message."""
    content = "".join(part.text for part in parts if isinstance(part, ContentDelta))
    reasoning = "".join(part.text for part in parts if isinstance(part, ReasoningDelta))
    calls: list[MadeToolCall] = []
    for part in parts:
        if isinstance(part, ToolCallStart):
            calls.append({"id": part.id, "type": "function", "function": {"name": part.name, "arguments": ""}})
        elif isinstance(part, ToolCallArguments):
            calls[part.index]["function"]["arguments"] += part.text
    message: AssistantMessage = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message


class ReplyParser:
    """Splits the text of one reply; call `feed` with each piece of text, then `finish`.

    Whitespace around calls and newlines around reasoning are separators and are dropped. Within a call, everything except its
    name and its arguments is dropped too. Arguments that are cut off with the reply are returned as they are.
    """

    def __init__(self, *, tools: bool, reasoning: Reasoning) -> None:
        """Start a reply.

        Args:
            tools: whether it may call tools; otherwise `<tool_call>` is plain text.
            reasoning: how the text begins.
        """
        self._tools = tools
        self._text = ""  # text that is not decided yet
        self._parts: list[ReplyPart] = []
        self._calls = 0
        self._after_call = False
        self._thought = False
        self._gap = ""  # whitespace before the current block
        self._json = Braces()
        self._read: Callable[[bool], bool] = {
            "started": self._thinking,
            "possible": self._opening,
            "none": self._content,
        }[reasoning]

    def feed(self, text: str) -> list[ReplyPart]:
        """Add text and return the parts that are certain now."""
        self._text += text
        return self._take(final=False)

    def finish(self) -> list[ReplyPart]:
        """End the reply and return the remaining parts."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> list[ReplyPart]:
        # Each state consumes text and returns whether the next state should continue at once.
        while self._read(final):
            pass
        parts, self._parts = self._parts, []
        return parts

    def _opening(self, final: bool) -> bool:
        """Read the start of the text, which may be the start of the reasoning."""
        begun = self._text.lstrip()
        if begun.startswith(THINK_START):
            self._text = begun.removeprefix(THINK_START)
            self._read = self._thinking
            return True
        if THINK_START.startswith(begun) and not final:
            return False
        self._read = self._content
        return True

    def _thinking(self, final: bool) -> bool:
        end = self._text.find(THINK_END)
        ended = end >= 0
        if not ended:
            end = len(self._text) - (0 if final else _begun(self._text, THINK_END))
        thought = self._text[:end].rstrip("\n")
        if not self._thought:
            thought = thought.lstrip("\n")
        if thought:
            self._parts.append(ReasoningDelta(thought))
            self._text = self._text[self._text.index(thought) + len(thought) :]
            self._thought = True
        if ended:
            self._text = self._text.partition(THINK_END)[2]
            self._read = self._after_thinking
        return ended

    def _after_thinking(self, final: bool) -> bool:
        self._text = self._text.lstrip("\n")
        if self._text:
            self._read = self._content
        return bool(self._text)

    def _content(self, final: bool) -> bool:
        start = self._text.find(CALL_START) if self._tools else -1
        if start < 0:
            end = len(self._text)
            if self._tools and not final:
                end = len(self._text[: end - _begun(self._text, CALL_START)].rstrip())
            if not (self._after_call and self._text[:end].isspace()):
                self._emit_content(self._text[:end])
            self._text = self._text[end:]
            return False
        words = self._text[:start].rstrip()
        self._emit_content(words)
        self._gap = self._text[len(words) : start]
        self._text = self._text[start + len(CALL_START) :]
        self._json = Braces()
        self._read = self._block
        return True

    def _block(self, final: bool) -> bool:
        """Read the start of a block: a call that names its function first, a call to read whole, or text."""
        if header := HEADER.match(self._text):
            self._start_call(header[1])
            self._text = self._text[header.end() :]
            self._json = Braces()
            self._read = self._arguments
            return True
        begin = len(self._text) - len(self._text.lstrip())
        if not self._text[begin:].startswith("{"):
            if begin == len(self._text) and not final:
                return False
            return self._no_call(0)
        end = self._json.read(self._text, begin)
        if not self._json.ended:
            return self._no_call(len(self._text)) if final else False
        call = parse_call(self._text[begin:end])
        if call is None:
            return self._no_call(end)
        self._start_call(call[0])
        self._parts.append(ToolCallArguments(self._calls - 1, call[1]))
        self._text = self._text[end:]
        self._read = self._closing
        return True

    def _arguments(self, final: bool) -> bool:
        end = self._json.read(self._text, 0, final=final)
        if end:
            self._parts.append(ToolCallArguments(self._calls - 1, self._text[:end]))
            self._text = self._text[end:]
            self._json.restart()
        ended = self._json.ended
        if ended:
            self._json = Braces(depth=1)
            self._read = self._rest_of_call
        return ended

    def _rest_of_call(self, final: bool) -> bool:
        end = self._json.read(self._text, 0, final=final)
        self._text = self._text[end:]
        self._json.restart()
        if self._json.ended:
            self._read = self._closing
        return self._json.ended

    def _closing(self, final: bool) -> bool:
        rest = self._text.lstrip()
        if rest.startswith(CALL_END):
            self._text = rest.removeprefix(CALL_END)
        elif CALL_END.startswith(rest):
            if not final:
                return False
            self._text = ""
        self._after_call = True
        self._read = self._content
        return True

    def _start_call(self, name: str) -> None:
        self._parts.append(ToolCallStart(self._calls, f"call_{str(ULID()).lower()}", name))
        self._calls += 1

    def _no_call(self, end: int) -> bool:
        """Return a block as text, up to an offset after its marker."""
        self._emit_content(self._gap + CALL_START + self._text[:end])
        self._text = self._text[end:]
        self._read = self._content
        return True

    def _emit_content(self, text: str) -> None:
        if text:
            self._parts.append(ContentDelta(text))
            self._after_call = False


def _begun(text: str, marker: str) -> int:
    """Return the number of characters at the end of a text that may be the start of a marker."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if marker.startswith(text[-n:])), 0)
