"""Grammars for a request's `response_format`, `tools` and `tool_choice`.

A model with reasoning may reason before a required call or a JSON answer. Calls have the one format that `tools` describes
to the model and `reply_parser` reads. With `tool_choice: auto` the text is free; but after `<tool_call>`, the rest is a call
of a known function with arguments that match its schema, and only further calls may follow. With `response_format` as well,
the reply is either calls or an answer in that format.
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
"""Maximum number of calls per reply; a small model might never stop calling."""

COMBINATORS = {"$ref", "allOf", "anyOf", "oneOf", "if", "not", "patternProperties", "dependentSchemas"}


def answer_schema(shape: ResponseFormat | None) -> Schema | None:
    """Return the schema that an answer must match; None for any text.

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
    """Return a schema whose objects allow only listed properties, unless the schema says otherwise.

    Args:
        schema: the schema.
        param: the request's parameter, for errors.
        strict: whether a keyword that cannot be enforced is an error.
    """
    return Schema(_closed(schema), param, strict)


def answer_grammar(answer: Schema, *, reasoning: Reasoning = "none") -> Grammar:
    """Return a grammar for JSON that matches a schema.

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
    """Return a grammar for tool calls: any number ("auto"), at least one ("required"), or one of a named function.

    Args:
        tools: the tools, at least one.
        choice: the request's `tool_choice`, not "none" and without unknown names.
        parallel: whether to allow up to `MAX_CALLS` calls; a named function is always called once.
        answer: schema of a reply without calls; None for any text, which may then also precede calls.
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
    """Return a grammar for a reply: optional reasoning, then the rule `answer`.

    Args:
        rules: the rule `answer`, and the rules that it uses.
        schemas: as in `Grammar`.
        markers: as in `Grammar`.
        reasoning: how the reply begins.
        param: the request's parameter, for errors; schemas have their own.
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
    """Return a schema whose objects allow only listed properties, unless the schema says otherwise.

    Everything that matches it also matches the original schema. A model might add properties to an open object endlessly.
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
