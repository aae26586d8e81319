"""From messages to tokens: the model's own chat template, and where each role's words are in the text it makes.

The template is rendered to text first and tokenized with offsets, so that a stored rollout can say which characters each
token covers. Who said what is found by rendering the conversation one turn longer each time: what a turn adds is its
segment. A template that rewrites earlier messages breaks that; then the whole prompt is one segment. Tools go to templates
that write calls as `<tool_call>`; for all others, `tools` puts them into plain words.
"""

import inspect
import logging
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from jinja2 import TemplateError, meta
from jinja2.sandbox import SandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from roentgen.tokenized_text import Segment, TokenizedText
from serve_app.models.tokenization import PROMPT, tokenize_rendered
from serve_app.openai_api.errors import ApiError
from serve_app.openai_api.messages import Message, Tool, check_tool_results
from serve_app.openai_api.tools import TemplateTurn, native_turns, offered, plain_turns, takes_tools

log = logging.getLogger(__name__)

MARK = "\ue000"
"""A character for private use, which no conversation has: it shows where a message's words begin."""

REFUSALS = (TemplateError, TypeError, ValueError, ArithmeticError, AttributeError, LookupError, RecursionError)
"""How a template fails on messages that it was not made for: by saying so, or in the middle of an expression."""


Ending = Literal["reply", "none", "open"]
"""What stands at the end of a rendered conversation: the words that begin a reply; the last message, closed; or the last
message, left open for the model to continue."""


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation."""

    prompt: TokenizedText
    """What the model sees."""
    turn_start: int
    """The first token that is new in this turn: the last one of the last assistant message, which the turn before sampled
    but did not feed; 0 in a first turn."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    model: str,
    tools: Sequence[Tool] = (),
    template_kwargs: dict[str, Any] | None = None,
    *,
    ending: Ending = "reply",
    add_special_tokens: bool = False,
) -> Rendered:
    """Render and tokenize a conversation, ready for the model's turn.

    Args:
        tokenizer: the model's, with its chat template.
        messages: the conversation.
        model: its name, for errors.
        tools: what the model may call.
        template_kwargs: variables of the template that the client sets.
        ending: what stands at its end.
        add_special_tokens: whether the tokenizer adds what begins, or ends, a text, beside what the template writes.

    Raises:
        ApiError: if the model has no chat template, the template refuses the messages, a variable is not to be set, or a
            tool's message answers no call.
    """
    if tokenizer.chat_template is None:
        raise ApiError(400, f"{model} has no chat template, so it cannot chat", param="messages")
    try:
        check_tool_results(messages)
    except ValueError as error:
        raise ApiError(400, str(error), param="messages") from error
    template = _Template(tokenizer, model, template_kwargs or {}, ending)
    try:
        turns = template.take(messages, tools)
        text = template.render(turns)
    except REFUSALS as error:
        raise ApiError(400, f"messages: {model}'s chat template refuses them: {error}", param="messages") from error
    segments = _segments(template, turns, text)
    prompt = tokenize_rendered(tokenizer, text, segments, add_special_tokens=add_special_tokens)
    added = prompt.segments[0].start - segments[0].start  # characters that the tokenizer put before it
    offsets = [offset - added for offset in prompt.token_offsets]
    return Rendered(prompt, _turn_start(template, turns, text, offsets))


class _Template:
    """A model's chat template, with what a request sets in it and the tools it is to show."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, model: str, variables: dict[str, Any], ending: Ending
    ) -> None:
        """Take a request's variables. One that the template does not use has no effect, and the log says so.

        Raises:
            ApiError: if one is not the client's to set.
        """
        self._tokenizer = tokenizer
        self.ending = ending
        self._shown: list[dict[str, Any]] | None = None
        self._variables: dict[str, Any] = {}
        if not variables:
            return
        ours = {*inspect.signature(tokenizer.apply_chat_template).parameters, *tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
        ours |= {"messages"}
        free = template_variables(tokenizer.get_chat_template()) - ours
        known = f"it has {', '.join(sorted(free))}" if free else "it has none"
        for name, value in variables.items():
            if name in ours:
                raise ApiError(
                    400,
                    f"chat_template_kwargs: {name!r} is not a variable of {model}'s chat template to be set; {known}",
                    param="chat_template_kwargs",
                )
            if name in free:
                self._variables[name] = value
            else:
                log.info("chat_template_kwargs: %s's chat template does not use %r; %s", model, name, known)

    def take(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[TemplateTurn]:
        """Write a conversation for this template, which shows the tools from now on if it can."""
        if not tools and not any(message.role == "tool" or message.tool_calls for message in messages):
            return native_turns(messages, self._takes_parts)
        try:
            native = takes_tools(self._try)
        except REFUSALS:
            native = False
        if native:
            self._shown = offered(tools) or None
            return native_turns(messages, self._takes_parts)
        try:
            has_system = "Agreed." in self._try(
                [{"role": "system", "content": "Agreed."}, {"role": "user", "content": "?"}], None
            )
        except REFUSALS:
            has_system = False
        return plain_turns(messages, tools, has_system=has_system)

    def render(self, turns: list[TemplateTurn], *, whole: bool = True) -> str:
        """Render turns to text.

        Args:
            turns: who says what.
            whole: whether they are the whole conversation, which ends as the request says, or its beginning.
        """
        messages = [message for turn in turns for message in turn.messages]
        rendered: Any = self._tokenizer.apply_chat_template(
            messages,
            tools=self._shown,
            tokenize=False,
            add_generation_prompt=whole and self.ending == "reply",
            continue_final_message=whole and self.ending == "open",
            **self._variables,
        )
        return str(rendered)

    def _takes_parts(self, role: str) -> bool:
        """Find out whether the template goes through the parts of a role's content, by trying it on two."""
        said = {"role": role, "content": [{"type": "text", "text": "Agreed."}, {"type": "text", "text": "Thanks."}]}
        user: dict[str, Any] = {"role": "user", "content": "?"}
        try:
            tried = self._try(
                [said, user] if role == "system" else [user, said] if role == "assistant" else [said], None
            )
        except REFUSALS:
            return False
        return "Agreed." in tried and "Thanks." in tried and "'type'" not in tried and '"type"' not in tried

    def _try(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        return str(self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))


@lru_cache(maxsize=8)
def template_variables(source: str) -> frozenset[str]:
    """Return the variables that a chat template looks up."""
    environment = SandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    environment.globals.update(dict.fromkeys(["raise_exception", "strftime_now"]))
    # transformers' own tag around what the assistant says; to jinja it is unknown.
    parsed = environment.parse(re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", source))
    return frozenset(meta.find_undeclared_variables(parsed))


def _segments(template: _Template, turns: list[TemplateTurn], text: str) -> list[Segment]:
    segments: list[Segment] = []
    start = 0
    for count, turn in enumerate(turns, start=1):
        if count == len(turns) and template.ending == "open":
            return [*segments, Segment(turn.role, start, len(text))]
        try:
            so_far = template.render(turns[:count], whole=False)
        except REFUSALS:  # some templates refuse a conversation that stops here
            return [Segment(PROMPT, 0, len(text))]
        if not text.startswith(so_far) or len(so_far) < start:
            return [Segment(PROMPT, 0, len(text))]
        segments.append(Segment(turn.role, start, len(so_far)))
        start = len(so_far)
    return segments


def _turn_start(template: _Template, turns: list[TemplateTurn], text: str, offsets: list[int]) -> int:
    """Return the token that covers the last character of the last assistant message's own words, calls included.

    If they cannot be found in what the template made of them, it is the first of its words, or the first token of all:
    rather kept twice than not at all.
    """
    said = turns[:-1] if template.ending == "open" else turns  # a message that is left open belongs to this turn
    last = max((place for place, turn in enumerate(said) if turn.role == "assistant"), default=None)
    if last is None:
        return 0
    start = _begins(template, turns, last, text)
    stop = len(text) if last == len(turns) - 1 else _begins(template, turns, last + 1, text)
    if start is None or stop is None:
        return 0
    found = text.rfind(turns[last].words, start, stop) if turns[last].words else -1
    character = start if found < 0 else found + len(turns[last].words) - 1
    return max(0, bisect_right(offsets, character) - 1)


def _begins(template: _Template, turns: list[TemplateTurn], place: int, text: str) -> int | None:
    """Return the character at which a turn's words begin: the first that changes when they begin with something else."""
    said, *others = turns[place].messages
    marked = TemplateTurn(turns[place].role, [{**said, "content": _marked(said["content"])}, *others], "")
    try:
        changed = template.render([*turns[:place], marked, *turns[place + 1 :]])
    except REFUSALS:
        return None
    return next((at for at, (old, new) in enumerate(zip(text, changed, strict=False)) if old != new), None)


def _marked(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return MARK + content
    first, *others = content
    return [{**first, "text": MARK + first["text"]}, *others]
