"""Renders messages with the model's chat template, and finds each role's segment in the text.

The template is rendered to text and then tokenized with offsets, so that a stored rollout records which characters each token
covers. Segments are found by rendering the conversation with one more turn at a time: the text that a turn adds is its
segment. If a template rewrites earlier messages, the whole prompt is one segment. Tools are passed to templates that write
calls as `<tool_call>`; for all other templates, `tools` describes them in plain text.
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
"""A private-use character that no conversation contains; it marks where a message's text begins."""

REFUSALS = (TemplateError, TypeError, ValueError, ArithmeticError, AttributeError, LookupError, RecursionError)
"""Exceptions of a template for messages that it does not support: its own errors, and errors in its expressions."""


Ending = Literal["reply", "none", "open"]
"""How a rendered conversation ends: with the start of a reply; with the last message, closed; or with the last message, left
open for the model to continue."""


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation."""

    prompt: TokenizedText
    """The tokenized prompt."""
    turn_start: int
    """Index of the first token that is new in this turn: the last token of the last assistant message, which the previous turn
    sampled but did not feed to the model. 0 in a first turn."""


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
        tokenizer: the model's tokenizer, with its chat template.
        messages: the conversation.
        model: the model's name, for errors.
        tools: tools that the model may call.
        template_kwargs: variables of the template that the client sets.
        ending: how the text ends.
        add_special_tokens: whether the tokenizer adds its special tokens to the template's text.

    Raises:
        ApiError: if the model has no chat template, the template refuses the messages, a variable may not be set, or a
            tool message answers no call.
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
        raise ApiError(
            400, f"messages: the chat template of {model} refuses them: {error}", param="messages"
        ) from error
    segments = _segments(template, turns, text)
    prompt = tokenize_rendered(tokenizer, text, segments, add_special_tokens=add_special_tokens)
    added = prompt.segments[0].start - segments[0].start  # characters that the tokenizer prepended
    offsets = [offset - added for offset in prompt.token_offsets]
    return Rendered(prompt, _turn_start(template, turns, text, offsets))


class _Template:
    """A model's chat template with a request's variables and tools."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, model: str, variables: dict[str, Any], ending: Ending
    ) -> None:
        """Check a request's variables. A variable that the template does not use has no effect and is logged.

        Raises:
            ApiError: if a client may not set a variable.
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
        known = f"allowed are {', '.join(sorted(free))}" if free else "it has no variables to set"
        for name, value in variables.items():
            if name in ours:
                raise ApiError(
                    400,
                    f"chat_template_kwargs: {name!r} may not be set for the chat template of {model}; {known}",
                    param="chat_template_kwargs",
                )
            if name in free:
                self._variables[name] = value
            else:
                log.info("chat_template_kwargs: the chat template of %s does not use %r; %s", model, name, known)

    def take(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[TemplateTurn]:
        """Convert a conversation for this template; if the template supports tools, `render` passes them to it."""
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
            turns: the turns.
            whole: whether they are the whole conversation, which ends as requested, or only its beginning.
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
        """Return whether the template supports content in parts for a role, by rendering two parts."""
        message = {"role": role, "content": [{"type": "text", "text": "Agreed."}, {"type": "text", "text": "Thanks."}]}
        user: dict[str, Any] = {"role": "user", "content": "?"}
        try:
            tried = self._try(
                [message, user] if role == "system" else [user, message] if role == "assistant" else [message], None
            )
        except REFUSALS:
            return False
        return "Agreed." in tried and "Thanks." in tried and "'type'" not in tried and '"type"' not in tried

    def _try(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        return str(self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))


@lru_cache(maxsize=8)
def template_variables(source: str) -> frozenset[str]:
    """Return the names of the variables that a chat template uses."""
    environment = SandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    environment.globals.update(dict.fromkeys(["raise_exception", "strftime_now"]))
    # transformers' own tag around the assistant's text, which jinja does not know.
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
        except REFUSALS:  # some templates refuse a conversation that ends here
            return [Segment(PROMPT, 0, len(text))]
        if not text.startswith(so_far) or len(so_far) < start:
            return [Segment(PROMPT, 0, len(text))]
        segments.append(Segment(turn.role, start, len(so_far)))
        start = len(so_far)
    return segments


def _turn_start(template: _Template, turns: list[TemplateTurn], text: str, offsets: list[int]) -> int:
    """Return the index of the token with the last character of the last assistant message's text, calls included.

    If that text is not found in the rendered text, return the first token of the message, or 0: a row is rather stored twice
    than not at all.
    """
    closed = turns[:-1] if template.ending == "open" else turns  # an open message belongs to this turn
    last = max((place for place, turn in enumerate(closed) if turn.role == "assistant"), default=None)
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
    """Return the offset where a turn's text begins: the first character that changes if the text starts with `MARK`."""
    first, *others = turns[place].messages
    marked = TemplateTurn(turns[place].role, [{**first, "content": _marked(first["content"])}, *others], "")
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
