import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from serve_app.engines.constraints import Constraints, Grammar, GrammarConstraint, Schema, SchemaError
from serve_app.engines.protocol import ConstraintError
from serve_app.models.model_source import locate
from tests.serve_app import tiny

ENDS = [2, 0]
SIZE = 49_152


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Masks are small: where other programs run too, threads would mostly wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(locate("smollm2-135m").path)


@pytest.fixture(scope="module")
def constraints(words: PreTrainedTokenizerFast) -> Constraints:
    return Constraints(words, SIZE + 64, ENDS)


def allowed(constraint: GrammarConstraint, size: int = SIZE + 64) -> set[int]:
    logits = torch.zeros(size)
    constraint.mask(logits)
    return set(logits.isfinite().nonzero()[:, 0].tolist())


def follows(constraint: GrammarConstraint, tokens: list[int]) -> bool:
    """Whether a constraint lets these tokens come, one after the other."""
    for token in tokens:
        if token not in allowed(constraint):
            return False
        constraint.accept(token)
    return True


def json_grammar(schema: dict[str, Any], *, strict: bool = True) -> Grammar:
    return Grammar("start: value", {"value": Schema(schema, "schema", strict)})


def test_only_what_goes_on_is_allowed_and_at_last_only_the_end(
    words: PreTrainedTokenizerFast, constraints: Constraints
) -> None:
    constraint = constraints.compile(json_grammar({"enum": ["yes", "no"]}))
    assert {words.decode([token]) for token in allowed(constraint)} <= {'"', '"y', '"n', '"no', '"yes'}
    for token in words.encode('"yes"'):
        constraint.accept(token)
    assert allowed(constraint) == set(ENDS)


def test_the_end_may_come_even_if_it_had_been_ruled_out(
    words: PreTrainedTokenizerFast, constraints: Constraints
) -> None:
    constraint = constraints.compile(json_grammar({"const": 1}))
    constraint.accept(words.encode("1")[0])
    logits = torch.zeros(SIZE + 64)
    logits[ENDS] = -torch.inf  # as a least length does
    constraint.mask(logits)
    assert logits.isfinite().nonzero()[:, 0].tolist() == sorted(ENDS)


def test_logits_may_be_shorter_or_longer_than_the_vocabulary(constraints: Constraints) -> None:
    constraint = constraints.compile(Grammar("start: /(?s:.*)/"))
    many = allowed(constraint, SIZE + 64)
    assert max(many) < SIZE
    assert allowed(constraint, SIZE + 1000) == many
    assert allowed(constraint, 1000) == {token for token in many if token < 1000}
    assert set(ENDS) <= many


def test_each_generation_has_a_constraint_of_its_own(words: PreTrainedTokenizerFast, constraints: Constraints) -> None:
    grammar = json_grammar({"enum": ["yes", "no"]})
    one, other = constraints.compile(grammar), constraints.compile(grammar)
    assert follows(one, words.encode('"yes"'))
    assert follows(other, words.encode('"no"'))


def test_json_is_written_in_one_way(words: PreTrainedTokenizerFast, constraints: Constraints) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}, "b": {}}}
    grammar = json_grammar(schema)
    text = json.dumps({"a": [1, -2], "b": {"c": None, "ü\n": '\\"'}}, ensure_ascii=False)
    assert follows(constraints.compile(grammar), [*words.encode(text), 2])
    for other in ('{"a":[', '{ "a', "{\n", '{"a": [1,2', '{"b": 1, "a"'):
        assert not follows(constraints.compile(grammar), words.encode(other))


def test_a_token_against_the_grammar_is_an_error(words: PreTrainedTokenizerFast, constraints: Constraints) -> None:
    constraint = constraints.compile(json_grammar({"type": "integer"}))
    with pytest.raises(ConstraintError, match="violates the grammar"):
        constraint.accept(words.encode("x")[0])
    with pytest.raises(ConstraintError, match="cannot be followed any further"):
        allowed(constraint)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "strin"}, "Invalid type: strin"),
        ({"type": "object", "properties": 3}, "properties must be an object"),
        ({"$ref": "#/$defs/x"}, "Pointer '/$defs/x' does not exist"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum (5) is greater than maximum (3)"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "string", "pattern": "(?=x)"}, "look-around, including look-ahead and look-behind, is not supported"),
    ],
)
def test_what_is_wrong_with_a_schema_is_said(constraints: Constraints, schema: dict[str, Any], reason: str) -> None:
    good = Schema({"type": "object"}, "tools.0", strict=True)
    grammar = Grammar("start: a | b", {"a": good, "b": Schema(schema, "tools.1", strict=False)})
    with pytest.raises(SchemaError) as caught:
        constraints.compile(grammar)
    assert caught.value.param == "tools.1"
    assert str(caught.value).startswith("tools.1: ")
    assert reason in str(caught.value)
    assert "%llguidance" not in str(caught.value)


def test_what_cannot_be_enforced_is_left_out_unless_it_is_strict(
    words: PreTrainedTokenizerFast, constraints: Constraints
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "format": "color"}}, "not": {}}
    with pytest.raises(SchemaError, match=r"Unimplemented keys: \[\"not\"\]"):
        constraints.compile(json_grammar(schema))
    assert follows(constraints.compile(json_grammar(schema, strict=False)), words.encode('{"a": "red"}'))


def test_a_grammar_that_is_too_large_is_an_error(constraints: Constraints) -> None:
    with pytest.raises(ConstraintError, match="the schemas have 1,"):
        constraints.compile(json_grammar({"enum": [f"{i:09}" for i in range(100_000)]}))
    deep: dict[str, Any] = {"type": "integer"}
    for _ in range(200):
        deep = {"type": "array", "items": deep}
    with pytest.raises(SchemaError, match="recursion limit"):
        constraints.compile(json_grammar(deep))


MARKED = Grammar('start: without_mark | to_mark "!" mark', markers={"mark": "</m>"})


@pytest.mark.parametrize("special", [False, True])
def test_a_marker_may_be_a_token(special: bool) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([AddedToken("</m>", special=special, normalized=False)])
    known = Constraints(tokenizer, len(tokenizer), [tiny.EOS])
    mark = tokenizer.convert_tokens_to_ids("</m>")
    spelled = [token for letter in "</m>" for token in tokenizer.encode(letter)]

    def may(tokens: list[int]) -> bool:
        constraint = known.compile(MARKED)
        for token in tokens:
            logits = torch.zeros(len(tokenizer))
            constraint.mask(logits)
            if not logits[token].isfinite():
                return False
            constraint.accept(token)
        return True

    assert may([*tokenizer.encode("hé </m"), tiny.EOS])
    assert may([*tokenizer.encode("hé "), mark, *tokenizer.encode("!"), mark, tiny.EOS])
    assert not may([mark, tiny.EOS])
    assert not may(spelled)  # it would be read as the marker


def test_a_marker_may_be_text(words: PreTrainedTokenizerFast, constraints: Constraints) -> None:
    def may(text: str) -> bool:
        return follows(constraints.compile(MARKED), [*words.encode(text), 2])

    assert may("hé </m")
    assert may("hé </m>!</m>")
    assert may("</m>!</m>")
    assert not may("</m>")
    assert not may("hé </m>?")
    assert not may("hé </m>!</m>.")
