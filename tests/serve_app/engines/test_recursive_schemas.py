"""Schemas that no finite value matches are rejected with the field's name; others are accepted."""

import json
import threading
from itertools import pairwise
from typing import Any

import pytest
import torch

from serve_app.engines.constraints import MAX_REASON, Constraints, Grammar, Schema, SchemaError
from serve_app.engines.recursive_schemas import has_finite_value
from tests.serve_app import tiny

ROOT = {"$ref": "#"}
NEXT = {"properties": {"next": ROOT}}
ITSELF = {"type": "object", **NEXT, "required": ["next"]}
HERE = "https://schemas.test/here"


def defs(first: Any, **others: Any) -> dict[str, Any]:
    return {"$defs": {"first": first, **others}, "$ref": "#/$defs/first"}


def listed(reference: str) -> dict[str, Any]:
    return {"type": "array", "items": {"$ref": reference}, "minItems": 1}


ENDLESS: dict[str, dict[str, Any]] = {
    "a required property": ITSELF,
    "the least items": {"type": "array", "items": ROOT, "minItems": 1},
    "a first item": {"type": "array", "prefixItems": [ROOT], "minItems": 1},
    "a first item, as older drafts have it": {"type": "array", "items": [ROOT], "minItems": 1},
    "a reference to itself": ROOT,
    "references in a circle": defs({"$ref": "#/$defs/other"}, other={"$ref": "#/$defs/first"}),
    "two schemas by turns": defs(
        {"type": "array", "items": {"$ref": "#/$defs/other"}, "minItems": 2},
        other={"type": "object", "properties": {"x": {"$ref": "#/$defs/first"}}, "required": ["x"]},
    ),
    "every option": {"anyOf": [ROOT, {"type": "array", "items": ROOT, "minItems": 1}]},
    "every type": {**ITSELF, "type": ["object", "array"], "items": ROOT, "minItems": 1},
    "described here, required there": {"type": "object", "allOf": [NEXT, {"required": ["next"]}]},
    "required by each option": {"type": "object", **NEXT, "anyOf": [{"required": ["next"]}]},
    "the least properties": {"type": "object", "minProperties": 1, "additionalProperties": ROOT},
    "properties by pattern": {
        "type": "object", "minProperties": 1, "patternProperties": {"^a": ROOT}, "additionalProperties": False},
    "by its name": {**listed(HERE), "$id": HERE},
    "by a relative name": {**listed("here"), "$id": HERE},
    "by an anchor": defs({**listed("#me"), "$anchor": "me"}),
    "by an escaped pointer": {"$defs": {"a b/c": listed("#/$defs/a%20b~1c")}, "$ref": "#/$defs/a%20b~1c"},
    "somewhere inside": {"type": "object", "properties": {"a": defs(ITSELF)}, "required": ["a"]},
}  # fmt: skip

FINITE: dict[str, dict[str, Any]] = {
    "a property that may be left out": {"type": "object", **NEXT},
    "an empty list": {"type": "array", "items": ROOT},
    "another type": {**ITSELF, "type": ["object", "null"]},
    "no type": {**NEXT, "required": ["next"]},
    "an option that ends": {
        "type": "object", "properties": {"next": {"anyOf": [ROOT, {"type": "null"}]}}, "required": ["next"]},
    "one of two circles is broken": defs(
        {"type": "array", "items": {"$ref": "#/$defs/other"}, "minItems": 1}, other={"anyOf": [ROOT, {"type": "integer"}]}),
    "an anchor": {"$defs": {"x": {"$anchor": "a", "type": "integer"}}, "type": "array", "items": {"$ref": "#a"}, "minItems": 1},
    "a part that applies twice": {
        "$defs": {"a": {"type": "integer"}}, "allOf": [{"$ref": "#/$defs/a"}], "anyOf": [{"$ref": "#/$defs/a"}]},
    "a value that is given": {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]},
    "a least number that others make up": {
        "type": "object", "minProperties": 1, "properties": {"next": ROOT, "b": {"type": "null"}},
        "additionalProperties": False},
}  # fmt: skip


def grammar(schema: dict[str, Any]) -> Grammar:
    return Grammar("start: value", {"value": Schema(schema, "response_format.json_schema.schema", strict=False)})


@pytest.fixture(scope="module")
def constraints() -> Constraints:
    tokenizer = tiny.tokenizer()
    return Constraints(tokenizer, len(tokenizer), [tiny.EOS])


@pytest.mark.parametrize("why", ENDLESS)
def test_a_schema_that_cannot_end_is_refused_by_name(constraints: Constraints, why: str) -> None:
    schema = ENDLESS[why]
    assert not has_finite_value(schema if why != "somewhere inside" else defs(ITSELF))
    with pytest.raises(SchemaError) as caught:
        constraints.compile(grammar(schema))
    assert caught.value.param == "response_format.json_schema.schema"
    message = str(caught.value)
    assert message.startswith("response_format.json_schema.schema: ")
    assert_plain(message)


@pytest.mark.parametrize("why", FINITE)
def test_one_that_can_end_is_followed(constraints: Constraints, why: str) -> None:
    assert has_finite_value(FINITE[why])
    constraint = constraints.compile(grammar(FINITE[why]))
    constraint.mask(torch.zeros(len(tiny.tokenizer())))


def assert_plain(message: str) -> None:
    """Nothing of the parser, of its state, or of our grammar's text."""
    assert len(message) <= MAX_REASON + 100
    assert "\n" not in message
    for inner in ("%llguidance", "<state>", "<grammar>", "x-guidance", "start:", "Tokens:", "ParserState", "lexer"):
        assert inner not in message


def drive(constraints: Constraints, schema: dict[str, Any], most: int) -> None:
    """Compile and follow a schema, each time by a property's name, or by the token with the highest id that is allowed."""
    constraint = constraints.compile(grammar(schema))
    names = tiny.tokenizer()('{"a"')["input_ids"]
    for number in range(most):
        logits = torch.zeros(len(tiny.tokenizer()))
        constraint.mask(logits)
        allowed = logits.isfinite().nonzero()[:, 0].tolist()
        constraint.accept(names[number] if number < len(names) and names[number] in allowed else allowed[-1])


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": {**listed("#/$defs/x")}}},
        {"type": "string", "pattern": "(" * 50 + "x" * 5000},
        {"type": "object", "properties": {"x" * 5000: {"type": "nothing"}}},
        {"$ref": "#/$defs/" + "y" * 5000},
        {"type": "integer", "minimum": 10**40, "maximum": 3},
    ],
)
def test_the_parsers_state_is_never_shown_and_a_message_is_bounded(
    constraints: Constraints, schema: dict[str, Any]
) -> None:
    with pytest.raises(SchemaError) as caught:
        drive(constraints, schema, 20)
    assert_plain(str(caught.value))


def test_a_token_against_the_grammar_says_nothing_of_the_parser(constraints: Constraints) -> None:
    constraint = constraints.compile(grammar({"type": "object", "properties": {"a" * 3000: {"type": "integer"}}}))
    with pytest.raises(SchemaError) as caught:
        constraint.accept(tiny.tokenizer()("x")["input_ids"][0])
    assert_plain(str(caught.value))
    with pytest.raises(SchemaError) as again:
        constraint.mask(torch.zeros(len(tiny.tokenizer())))
    assert_plain(str(again.value))


def chain(length: int, *, ends: bool) -> dict[str, Any]:
    """Objects, each of which requires the next."""
    found: dict[str, Any] = {
        f"d{i}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/d{i + 1}"}}, "required": ["x"]}
        for i in range(length)
    }
    found[f"d{length}"] = {"type": "integer"} if ends else {"$ref": "#/$defs/d0"}
    return {"$defs": found, "$ref": "#/$defs/d0"}


def test_a_long_chain_of_references_is_compiled(constraints: Constraints) -> None:
    """llguidance recurses: on a thread's usual stack it ends the process, here after some hundred references."""
    before = threading.stack_size()
    constraints.compile(grammar(chain(1200, ends=True)))
    assert threading.stack_size() == before
    assert not has_finite_value(chain(1200, ends=False))


def test_references_beyond_what_is_looked_at_count_as_ending() -> None:
    names = [f"d{i}" for i in range(3000)]
    pure: dict[str, Any] = {"$defs": {name: {"$ref": f"#/$defs/{following}"} for name, following in pairwise(names)}}
    pure["$defs"][names[-1]] = {"type": "integer"}
    pure |= {"type": "object", "properties": {name: {"$ref": f"#/$defs/{name}"} for name in names}, "required": names}
    assert has_finite_value(json.loads(json.dumps(pure)))
