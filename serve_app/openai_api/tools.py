"""Describes tools to a model, and writes calls and results in the Hermes format, as text.

A call consists of `<tool_call>`, a JSON object with `name` and `arguments`, and `</tool_call>`, each on its own line. Many
templates (Qwen's, Hermes') write exactly this; they are given the tools. Every other template, which has no tools or another
format for calls, is given the same protocol in plain text (docs/tools.md): a system message describes the tools, calls are the
assistant's text, and results are a user message. So every model is prompted, constrained (`grammars`) and parsed
(`reply_parser`) in one format.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from serve_app.engines.markers import CALL_END, CALL_START
from serve_app.openai_api.messages import Message, Tool

HOW_TO_CALL = f"""To call a function, write its name and its arguments, a JSON object, in a block like this one:
{CALL_START}
{{"name": "function_name", "arguments": {{"argument_name": "value"}}}}
{CALL_END}
For several calls, write one block after another. The results come back in <tool_response> blocks. \
To answer without calling a function, just write the answer."""


@dataclass(frozen=True)
class TemplateTurn:
    """One turn of a role, in the format of chat templates."""

    role: str
    """The speaker's role."""
    messages: list[dict[str, Any]]
    """The messages for the template; several only if several tools answer."""
    words: str
    """The end of the turn's rendered text, as far as it is known."""


def native_turns(
    messages: Sequence[Message], in_parts: Callable[[str], bool] = lambda role: False
) -> list[TemplateTurn]:
    """Convert a conversation for a template with tools; results are in the order of their calls.

    Args:
        messages: the conversation, which has passed `check_tool_results`.
        in_parts: returns whether the template supports content in parts for a role.
    """
    turns: list[TemplateTurn] = []
    names: dict[str, str] = {}
    for message in messages:
        if message.role == "tool":
            call = str(message.tool_call_id)
            result = {"role": "tool", "content": message.content, "tool_call_id": call, "name": names[call]}
            if turns and turns[-1].role == "tool":
                turns[-1].messages.append(result)
                # The model sees no ids, so the order relates results to calls.
                turns[-1].messages.sort(key=lambda sent: list(names).index(sent["tool_call_id"]))
            else:
                turns.append(TemplateTurn("tool", [result], message.content))
            continue
        role = "system" if message.role == "developer" else message.role
        words = message.content
        entry: dict[str, Any] = {"role": role, "content": message.content}
        if len(message.parts) > 1 and in_parts(role):
            entry["content"] = [{"type": "text", "text": text} for text in message.parts]
            words = message.parts[-1]
        if message.name is not None:
            entry["name"] = message.name
        if message.reasoning_content is not None:
            entry["reasoning_content"] = message.reasoning_content
        words = words.strip()
        names = {call.id: call.function.name for call in message.tool_calls}
        if message.tool_calls:
            words = CALL_END
            entry["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": _loaded(call.function.arguments)},
                }
                for call in message.tool_calls
            ]
        turns.append(TemplateTurn(role, [entry], words))
    return turns


def plain_turns(messages: Sequence[Message], tools: Sequence[Tool], *, has_system: bool) -> list[TemplateTurn]:
    """Convert a conversation for a template that has only the roles system, user and assistant, possibly alternating.

    Args:
        messages: the conversation.
        tools: tools that the model may call.
        has_system: whether the template has system messages; if not, the first user message describes the tools.
    """
    calls = iter([message for message in messages if message.tool_calls])
    turns: list[TemplateTurn] = []
    for turn in native_turns(messages):
        entry = dict(turn.messages[0])
        if turn.role == "tool":
            entry = {"role": "user", "content": "\n".join(_result(sent["content"]) for sent in turn.messages)}
        elif turn.role == "user" and turns and turns[-1].role == "tool":
            entry["content"] = f"{turns.pop().messages[0]['content']}\n{entry['content']}"
        elif entry.pop("tool_calls", None):
            blocks = [_call(call.function.name, call.function.arguments) for call in next(calls).tool_calls]
            entry["content"] = "\n".join([entry["content"], *blocks] if entry["content"] else blocks)
        turns.append(TemplateTurn(turn.role, [entry], turn.words))
    if tools:
        _describe(turns, tools, "system" if has_system else "user")
    return turns


def offered(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Return tools in the format of chat templates."""
    return [{"type": "function", "function": _signature(tool)} for tool in tools]


def takes_tools(template: Callable[[list[dict[str, Any]], list[dict[str, Any]]], str]) -> bool:
    """Return whether a chat template shows tools and writes calls in the Hermes format, by rendering a call.

    Args:
        template: renders messages with tools; it raises an exception if it cannot.
    """
    call = {"id": "call00000", "type": "function", "function": {"name": "weigh", "arguments": {"item": "feather"}}}
    tried = template(
        [
            {"role": "user", "content": "How heavy is it?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "next to nothing", "name": "weigh", "tool_call_id": "call00000"},
        ],
        [{"type": "function", "function": {"name": "weigh", "description": "On scales.", "parameters": {}}}],
    )
    written = _call("weigh", '{"item": "feather"}')
    return all(piece in tried for piece in (written, "next to nothing", "On scales."))


def _describe(turns: list[TemplateTurn], tools: Sequence[Tool], role: str) -> None:
    """Add the tools' description to the end of the system message, or to the start of the first user message."""
    listed = "\n".join(json.dumps(_signature(tool), ensure_ascii=False) for tool in tools)
    description = f"You may call these functions:\n{listed}\n\n{HOW_TO_CALL}"
    place = next((i for i, turn in enumerate(turns) if turn.messages[0]["role"] == role), None)
    if place is None or (role == "system" and place > 0):
        turns.insert(0, TemplateTurn(role, [{"role": role, "content": description}], description))
        return
    entry = turns[place].messages[0]
    pieces = [entry["content"], description] if role == "system" else [description, entry["content"]]
    entry["content"] = "\n\n".join(piece for piece in pieces if piece)


def _signature(tool: Tool) -> dict[str, Any]:
    function = tool.function
    described = {} if function.description is None else {"description": function.description}
    return {"name": function.name, **described, "parameters": function.parameters}


def _call(name: str, arguments: str) -> str:
    # Verbatim, so that the prompt continues what the model wrote in the previous turn.
    return f'{CALL_START}\n{{"name": {json.dumps(name)}, "arguments": {arguments.strip() or "{}"}}}\n{CALL_END}'


def _result(content: str) -> str:
    return f"<tool_response>\n{content}\n</tool_response>"


def _loaded(arguments: str) -> Any:
    """Return arguments as a dictionary, which templates expect; unchanged if they were cut off."""
    try:
        value = json.loads(arguments or "{}")
    except json.JSONDecodeError:
        return arguments
    return value if isinstance(value, dict) else arguments
