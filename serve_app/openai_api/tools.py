"""How a model is told of tools, and how calls and their results are written: the Hermes form, as text.

A call is `<tool_call>`, a JSON object with `name` and `arguments`, `</tool_call>`, each on a line of its own. Many templates
(Qwen's, Hermes') write exactly this, and then they are given the tools. Every other template, whether it knows no tools or
calls them in another way, is given the same protocol in plain words (docs/tools.md): a system message describes the tools,
calls are text of the assistant, results are a user's message. So every model is prompted, constrained (`grammars`) and
read (`reply_parser`) in one form.
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
    """What one role says at a time, as a chat template takes it."""

    role: str
    """Who speaks."""
    messages: list[dict[str, Any]]
    """The template's messages; several only where several tools answer."""
    words: str
    """The last words of it that the template is to render, as far as they are known."""


def native_turns(
    messages: Sequence[Message], in_parts: Callable[[str], bool] = lambda role: False
) -> list[TemplateTurn]:
    """Write a conversation for a template that knows tools; results come in the order of their calls.

    Args:
        messages: the conversation, which has passed `check_tool_results`.
        in_parts: whether the template takes a role's content in parts; it is asked where there are several.
    """
    turns: list[TemplateTurn] = []
    names: dict[str, str] = {}
    for message in messages:
        if message.role == "tool":
            call = str(message.tool_call_id)
            result = {"role": "tool", "content": message.content, "tool_call_id": call, "name": names[call]}
            if turns and turns[-1].role == "tool":
                turns[-1].messages.append(result)
                # The model sees no ids: it knows by the order which result is which call's.
                turns[-1].messages.sort(key=lambda sent: list(names).index(sent["tool_call_id"]))
            else:
                turns.append(TemplateTurn("tool", [result], message.content))
            continue
        role = "system" if message.role == "developer" else message.role
        words = message.content
        said: dict[str, Any] = {"role": role, "content": message.content}
        if len(message.parts) > 1 and in_parts(role):
            said["content"] = [{"type": "text", "text": text} for text in message.parts]
            words = message.parts[-1]
        if message.name is not None:
            said["name"] = message.name
        if message.reasoning_content is not None:
            said["reasoning_content"] = message.reasoning_content
        words = words.strip()
        names = {call.id: call.function.name for call in message.tool_calls}
        if message.tool_calls:
            words = CALL_END
            said["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": _loaded(call.function.arguments)},
                }
                for call in message.tool_calls
            ]
        turns.append(TemplateTurn(role, [said], words))
    return turns


def plain_turns(messages: Sequence[Message], tools: Sequence[Tool], *, has_system: bool) -> list[TemplateTurn]:
    """Write a conversation for a template that knows only system, user and assistant, who may have to take turns.

    Args:
        messages: the conversation.
        tools: what the model may call.
        has_system: whether the template takes a system message; the tools are described to the first user otherwise.
    """
    calls = iter([message for message in messages if message.tool_calls])
    turns: list[TemplateTurn] = []
    for turn in native_turns(messages):
        said = dict(turn.messages[0])
        if turn.role == "tool":
            said = {"role": "user", "content": "\n".join(_result(sent["content"]) for sent in turn.messages)}
        elif turn.role == "user" and turns and turns[-1].role == "tool":
            said["content"] = f"{turns.pop().messages[0]['content']}\n{said['content']}"
        elif said.pop("tool_calls", None):
            blocks = [_call(call.function.name, call.function.arguments) for call in next(calls).tool_calls]
            said["content"] = "\n".join([said["content"], *blocks] if said["content"] else blocks)
        turns.append(TemplateTurn(turn.role, [said], turn.words))
    if tools:
        _describe(turns, tools, "system" if has_system else "user")
    return turns


def offered(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Write tools as chat templates take them."""
    return [{"type": "function", "function": _signature(tool)} for tool in tools]


def takes_tools(template: Callable[[list[dict[str, Any]], list[dict[str, Any]]], str]) -> bool:
    """Find out whether a chat template shows tools and writes calls in the Hermes form, by trying it on a call.

    Args:
        template: renders messages with tools; its exceptions say that it cannot.
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
    """Put the tools' description after the system message's words, or before the first user's."""
    listed = "\n".join(json.dumps(_signature(tool), ensure_ascii=False) for tool in tools)
    description = f"You may call these functions:\n{listed}\n\n{HOW_TO_CALL}"
    place = next((i for i, turn in enumerate(turns) if turn.messages[0]["role"] == role), None)
    if place is None or (role == "system" and place > 0):
        turns.insert(0, TemplateTurn(role, [{"role": role, "content": description}], description))
        return
    said = turns[place].messages[0]
    pieces = [said["content"], description] if role == "system" else [description, said["content"]]
    said["content"] = "\n\n".join(piece for piece in pieces if piece)


def _signature(tool: Tool) -> dict[str, Any]:
    function = tool.function
    described = {} if function.description is None else {"description": function.description}
    return {"name": function.name, **described, "parameters": function.parameters}


def _call(name: str, arguments: str) -> str:
    # Verbatim, so that the prompt goes on from what the model wrote the turn before.
    return f'{CALL_START}\n{{"name": {json.dumps(name)}, "arguments": {arguments.strip() or "{}"}}}\n{CALL_END}'


def _result(content: str) -> str:
    return f"<tool_response>\n{content}\n</tool_response>"


def _loaded(arguments: str) -> Any:
    """Return arguments as templates expect them, a dictionary; as they are if they were cut."""
    try:
        value = json.loads(arguments or "{}")
    except json.JSONDecodeError:
        return arguments
    return value if isinstance(value, dict) else arguments
