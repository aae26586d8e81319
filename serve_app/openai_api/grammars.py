"""The grammars that a request's `response_format`, `tools` and `tool_choice` ask for.

A model that must call a function, or answer in JSON, may think first, where it does so at all. Calls have one form, the one
that `tools` describes to the model and `reply_parser` reads. Without a choice the model writes what it likes; but once it has
written `<tool_call>`, the rest is a call of a known function with arguments that match its schema, and after calls nothing
but calls comes. If `response_format` is there too, what the model likes is either calls or an answer in that form.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from serve_app.engines.constraints import Grammar, Schema
from serve_app.engines.markers import CALL_END, CALL_START, THINK_END, THINK_START
from serve_app.openai_api.messages import (
    AllowedToolsChoice,
    NamedToolChoice,
    ResponseFormat,
    Tool,
    ToolChoice,
    callable_names,
)
from serve_app.openai_api.reply_parser import Reasoning

THOUGHTS = {"think_start": THINK_START, "think_end": THINK_END}
BLOCKS = {"call_start": CALL_START, "call_end": CALL_END}
MAX_CALLS = 8
"""Calls that may be made at once; a small model that has begun to call would never stop."""

COMBINATORS = {"$ref", "allOf", "anyOf", "oneOf", "if", "not", "patternProperties", "dependentSchemas"}


def answer_schema(shape: ResponseFormat | None) -> Schema | None:
    """Return the schema that an answer must match, None if it may be any text.

    Args:
        shape: the request's `response_format`.
    """
    if shape is None or shape.type == "text":
        return None
    if shape.json_schema is None:
        return Schema({"type": "object"}, "response_format", strict=False)
    asked = shape.json_schema
    return closed_schema(asked.schema_, "response_format.json_schema.schema", strict=asked.strict)


def closed_schema(schema: Mapping[str, Any], param: str, *, strict: bool = False) -> Schema:
    """Return a schema whose objects have no properties but those listed, unless it says otherwise.

    Args:
        schema: the schema.
        param: where the request has it, for errors.
        strict: whether a keyword that cannot be enforced is an error.
    """
    return Schema(_closed(schema), param, strict)


def answer_grammar(answer: Schema, *, reasoning: Reasoning = "none") -> Grammar:
    """JSON that matches a schema.

    Args:
        answer: the schema.
        reasoning: how the reply begins.
    """
    return after_thoughts("answer: object", {"object": answer}, {}, reasoning)


def tool_call_grammar(
    tools: Sequence[Tool],
    choice: ToolChoice,
    parallel: bool,
    *,
    answer: Schema | None = None,
    reasoning: Reasoning = "none",
) -> Grammar:
    """Calls of tools: as the model likes ("auto"), at least one ("required"), or one of a named function.

    Args:
        tools: what may be called, at least one; "none" and unknown names are not for here.
        choice: the request's `tool_choice`.
        parallel: whether up to `MAX_CALLS` may be made at once; of a named function it is always one.
        answer: what a reply that calls nothing must match; None for any text, which may then stand before calls, too.
        reasoning: how the reply begins.
    """
    allowed = callable_names(choice)
    calls, schemas = [], {}
    for place, tool in enumerate(tools):
        function = tool.function
        if allowed is None or function.name in allowed:
            opening = f'{{"name": {json.dumps(function.name)}, "arguments": '
            calls.append(f'{json.dumps(opening)} arguments_{place} "}}"')
            schemas[f"arguments_{place}"] = Schema(
                _closed(function.parameters), f"tools.{place}.function.parameters", function.strict
            )
    more = f'("\\n" call_start rest){{0,{MAX_CALLS - 1}}}'
    if not parallel or isinstance(choice, NamedToolChoice):
        more = ""
    mode = choice.allowed_tools.mode if isinstance(choice, AllowedToolsChoice) else choice
    if mode != "auto":
        reply = f"call_start rest {more}"
    elif answer is None:
        reply = f"without_call_start | to_call_start rest {more}"
    else:
        reply = f"object | call_start rest {more}"
        schemas["object"] = answer
    rules = "\n".join([f"answer: {reply}", r'rest: "\n" call "\n" call_end', f"call: {' | '.join(calls)}"])
    return after_thoughts(rules, schemas, BLOCKS, reasoning)


def after_thoughts(
    rules: str,
    schemas: Mapping[str, Schema],
    markers: Mapping[str, str],
    reasoning: Reasoning,
    *,
    param: str = "tools",
) -> Grammar:
    """Return a grammar for a reply: what it thinks, where it does, and then the rule `answer`.

    Args:
        rules: `answer`, and what it needs.
        schemas: as in `Grammar`.
        markers: as in `Grammar`.
        reasoning: how the reply begins.
        param: where the request asks for it, for errors; schemas have their own.
    """
    start = {
        "none": "start: answer",
        "possible": "start: answer | think_start to_think_end GAP answer",
        "started": "start: to_think_end GAP answer",
    }[reasoning]
    if reasoning == "none":
        return Grammar(f"{start}\n{rules}", schemas, markers, param)
    return Grammar(f"{start}\nGAP: /\\n{{0,2}}/\n{rules}", schemas, {**markers, **THOUGHTS}, param)


def _closed(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a schema whose objects have the properties that are listed and no others, unless it says otherwise.

    What matches it matches the schema as it was. Left open, an object is an invitation to add to it without end.
    """
    closed = dict(schema)
    if COMBINATORS & closed.keys():
        return closed
    if isinstance(items := closed.get("items"), dict):
        closed["items"] = _closed(items)
    properties, required = closed.get("properties"), closed.get("required", [])
    if isinstance(properties, dict) and isinstance(required, list) and properties.keys() >= set(required):
        closed["properties"] = {
            name: _closed(inner) if isinstance(inner, dict) else inner for name, inner in properties.items()
        }
        closed.setdefault("additionalProperties", False)
    return closed
