"""What the grammars let real vocabularies say; where chance draws the tokens, it draws whatever is allowed."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from serve_app.engines.constraints import Constraints, Grammar, GrammarConstraint, Schema, SchemaError
from serve_app.models.model_source import locate
from serve_app.openai_api.grammars import answer_grammar, answer_schema, tool_call_grammar
from serve_app.openai_api.messages import (
    AllowedTools,
    AllowedToolsChoice,
    FunctionName,
    NamedToolChoice,
    ResponseFormat,
    Tool,
)
from serve_app.openai_api.reply_parser import Reasoning, ReplyParser, assemble
from tests.reference import smollm2
from tests.serve_app import tiny

POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
PARAMETERS: dict[str, dict[str, Any]] = {
    "add": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "number"}}, "required": ["a"]},
    "add_all": {"type": "object", "properties": {"of": {"enum": ["x", "y"]}, "exact": {"type": "boolean"}}},
    "move": {"type": "object", "properties": {"to": {"$ref": "#/$defs/point"}}, "required": ["to"],
             "additionalProperties": False, "$defs": {"point": POINT}},
    "now": {"type": "object", "properties": {}},
}  # fmt: skip
TOOLS = [
    Tool.model_validate({"type": "function", "function": {"name": name, "parameters": parameters}})
    for name, parameters in PARAMETERS.items()
]
MOVE = NamedToolChoice(type="function", function=FunctionName(name="move"))
ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2.5}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


def shape(schema: dict[str, Any] | None = None) -> Schema:
    """What `response_format` asks for: JSON that matches a schema, or any object."""
    asked = (
        {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}} if schema else {"type": "json_object"}
    )
    found = answer_schema(ResponseFormat.model_validate(asked))
    assert found is not None
    return found


def json_like(schema: dict[str, Any], reasoning: Reasoning = "none") -> Grammar:
    return answer_grammar(shape(schema), reasoning=reasoning)


def an_object(reasoning: Reasoning = "none") -> Grammar:
    return answer_grammar(shape(), reasoning=reasoning)


def allowed(mode: Any, *names: str) -> AllowedToolsChoice:
    tools = [NamedToolChoice(type="function", function=FunctionName(name=name)) for name in names]
    return AllowedToolsChoice(type="allowed_tools", allowed_tools=AllowedTools(mode=mode, tools=tools))


class Speaker:
    """A vocabulary, what it can be held to, and what it says."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, end: int) -> None:
        self.tokenizer = tokenizer
        self.end = end
        self.constraints = Constraints(tokenizer, len(tokenizer), [end])

    def may_say(self, grammar: Grammar, text: str) -> bool:
        constraint = self.constraints.compile(grammar)
        for token in [*self.tokenizer.encode(text), self.end]:
            logits = torch.zeros(len(self.tokenizer))
            constraint.mask(logits)
            if not logits[token].isfinite():
                return False
            constraint.accept(token)
        return True

    def say(self, constraint: GrammarConstraint, choose: Callable[[torch.Tensor, list[int]], int], most: int) -> str:
        """Generate; fails if the grammar does not end in time."""
        tokens: list[int] = []
        while self.end not in tokens:
            assert len(tokens) < most, self.tokenizer.decode(tokens)
            logits = torch.zeros(len(self.tokenizer))
            tokens.append(choose(logits, tokens))
        return self.tokenizer.decode(tokens[:-1], skip_special_tokens=False)

    def babble(self, grammar: Grammar, seed: int, most: int = 1500) -> str:
        """Say whatever is allowed: random logits, but what could end a string or a number has better chances."""
        constraint = self.constraints.compile(grammar)
        random = np.random.default_rng(seed)
        finals = [*(self.tokenizer.encode(sign)[0] for sign in '"}],\n'), self.end]

        def choose(logits: torch.Tensor, tokens: list[int]) -> int:
            logits += torch.from_numpy(random.normal(size=len(logits)).astype(np.float32))
            logits[finals] += 5
            constraint.mask(logits)
            token = int(logits.argmax())
            constraint.accept(token)
            return token

        return self.say(constraint, choose, most)


def bytes_with_markers() -> PreTrainedTokenizerFast:
    """A vocabulary in which the markers are tokens, as in Qwen's."""
    tokenizer = tiny.tokenizer()
    markers = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
    tokenizer.add_tokens([AddedToken(marker, special=False, normalized=False) for marker in markers])
    return tokenizer


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Masks are small: where other programs run too, threads would mostly wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def speakers() -> dict[str, Speaker]:
    smol = AutoTokenizer.from_pretrained(locate("smollm2-135m").path)
    return {"text": Speaker(smol, 2), "tokens": Speaker(bytes_with_markers(), tiny.EOS)}


KINDS = pytest.mark.parametrize("kind", ["text", "tokens"])


def read_calls(text: str, reasoning: Reasoning = "none") -> tuple[str | None, list[tuple[str, Any]]]:
    parser = ReplyParser(tools=True, reasoning=reasoning)
    message = assemble([*parser.feed(text), *parser.finish()])
    calls = [call["function"] for call in message.get("tool_calls", [])]
    return message["content"], [(call["name"], json.loads(call["arguments"])) for call in calls]


def check_calls(calls: list[tuple[str, Any]]) -> None:
    for name, arguments in calls:
        jsonschema.validate(arguments, PARAMETERS[name] | {"additionalProperties": False})


@KINDS
@pytest.mark.parametrize(
    ("choice", "parallel", "text", "allowed"),
    [
        ("auto", True, "Four. <tool", True),
        ("auto", True, f"I add.\n{ADD}\n{NOW}", True),
        ("auto", False, ADD, True),
        ("auto", False, f"{ADD}\n{NOW}", False),
        ("auto", True, f"{ADD}\nDone.", False),
        ("auto", True, "The marker is <tool_call> then", False),
        ("required", True, f"{NOW}\n{ADD}", True),
        ("required", True, "\n".join([NOW] * 8), True),
        ("required", True, "\n".join([NOW] * 9), False),
        ("required", False, ADD, True),
        ("required", False, f"{NOW}\n{ADD}", False),
        ("required", True, "Four.", False),
        ("required", True, ADD.replace("add", "added"), False),
        ("required", True, ADD.replace("1", '"1"'), False),
        ("required", True, ADD.replace("2.5", '2.5, "c": 3'), False),
        (MOVE, True, '<tool_call>\n{"name": "move", "arguments": {"to": {"x": 3}}}\n</tool_call>', True),
        (MOVE, True, NOW, False),
    ],
)
def test_calls(speakers: dict[str, Speaker], kind: str, choice: Any, parallel: bool, text: str, allowed: bool) -> None:
    assert speakers[kind].may_say(tool_call_grammar(TOOLS, choice, parallel), text) == allowed


@KINDS
@pytest.mark.parametrize(
    ("choice", "text", "may"),
    [
        ("auto", '{"x": 3}', True),
        ("auto", f"{ADD}\n{NOW}", True),
        ("auto", "Four.", False),
        ("auto", '{"y": 3}', False),
        ("auto", f"I add.\n{ADD}", False),
        ("auto", f'{{"x": 3}}\n{ADD}', False),
        ("required", '{"x": 3}', False),
        ("required", ADD, True),
        (MOVE, '{"x": 3}', False),
        (allowed("auto", "now"), '{"x": 3}', True),
        (allowed("auto", "now"), NOW, True),
        (allowed("auto", "now"), ADD, False),
        (allowed("required", "now"), '{"x": 3}', False),
    ],
)
def test_calls_or_else_the_answer_s_schema(
    speakers: dict[str, Speaker], kind: str, choice: Any, text: str, may: bool
) -> None:
    for reasoning, before in (("none", ""), ("possible", "<think>\nHm.\n</think>\n\n"), ("started", "Hm.</think>")):
        grammar = tool_call_grammar(TOOLS, choice, True, answer=shape(POINT), reasoning=reasoning)
        assert speakers[kind].may_say(grammar, before + text) == may


@KINDS
@pytest.mark.parametrize(
    ("choice", "text", "may"),
    [
        (allowed("auto", "add", "move"), "Four.", True),
        (allowed("auto", "add", "move"), f"I add.\n{ADD}", True),
        (allowed("auto", "add", "move"), NOW, False),
        (allowed("required", "add", "now"), f"{NOW}\n{ADD}", True),
        (allowed("required", "add"), "Four.", False),
        (allowed("required", "add"), f"{ADD}\n{NOW}", False),
    ],
)
def test_only_some_tools_are_allowed(
    speakers: dict[str, Speaker], kind: str, choice: Any, text: str, may: bool
) -> None:
    assert speakers[kind].may_say(tool_call_grammar(TOOLS, choice, True), text) == may


@KINDS
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), parallel=st.booleans(), mode=st.sampled_from(["auto", "required"]))
def test_whatever_is_drawn_is_calls_or_matches_the_schema(
    speakers: dict[str, Speaker], kind: str, seed: int, parallel: bool, mode: str
) -> None:
    text = speakers[kind].babble(
        tool_call_grammar(TOOLS, allowed(mode, "add", "now"), parallel, answer=shape(POINT)), seed
    )
    content, calls = read_calls(text)
    check_calls(calls)
    assert {name for name, _ in calls} <= {"add", "now"}
    assert (content is None) == bool(calls)
    if content is not None:
        assert mode == "auto"
        jsonschema.validate(json.loads(content), POINT)


@KINDS
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_thoughts_come_first_where_a_model_thinks(speakers: dict[str, Speaker], kind: str, choice: Any) -> None:
    def may(reasoning: Reasoning, text: str) -> bool:
        return speakers[kind].may_say(tool_call_grammar(TOOLS, choice, True, reasoning=reasoning), text)

    thoughts = f"Perhaps <x> {{\n</think>\n\n{ADD}"
    assert may("started", thoughts)
    assert may("possible", f"<think>{thoughts}")
    assert may("possible", ADD)
    assert not may("started", ADD)
    assert read_calls(thoughts, "started") == (None, [("add", {"a": 1, "b": 2.5})])


@KINDS
def test_json_after_thoughts(speakers: dict[str, Speaker], kind: str) -> None:
    speaker = speakers[kind]
    assert speaker.may_say(an_object(reasoning="started"), 'Hm.</think>\n{"a": [{}]}')
    assert speaker.may_say(json_like(POINT, reasoning="possible"), '{"x": 3}')
    assert not speaker.may_say(json_like(POINT), '<think></think>{"x": 3}')
    assert not speaker.may_say(an_object(), "[1]")


def test_a_tool_that_cannot_be_followed_is_named(speakers: dict[str, Speaker]) -> None:
    strict = {"name": "odd", "strict": True, "parameters": {"type": "object", "propertyNames": {"pattern": "a"}}}
    odd = Tool.model_validate({"type": "function", "function": strict})
    with pytest.raises(SchemaError, match=r"propertyNames") as caught:
        speakers["tokens"].constraints.compile(tool_call_grammar([*TOOLS, odd], "auto", True))
    assert caught.value.param == "tools.4.function.parameters"
    with pytest.raises(SchemaError) as caught:
        speakers["tokens"].constraints.compile(json_like({"type": "x"}))
    assert caught.value.param == "response_format.json_schema.schema"


def test_an_open_schema_stays_open_where_it_says_so(speakers: dict[str, Speaker]) -> None:
    def may(schema: dict[str, Any]) -> bool:
        return speakers["tokens"].may_say(json_like(schema), '{"x": 3, "y": 4}')

    assert not may(POINT)
    assert may(POINT | {"additionalProperties": True})
    assert may({"anyOf": [POINT]} | POINT)
    assert may({"type": "object"})
    assert may({"type": "object", "properties": {"x": {}}, "required": ["y"]})


@KINDS
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), parallel=st.booleans(), choice=st.sampled_from(["required", MOVE, "auto"]))
def test_whatever_is_drawn_the_calls_are_valid(
    speakers: dict[str, Speaker], kind: str, seed: int, parallel: bool, choice: Any
) -> None:
    text = speakers[kind].babble(tool_call_grammar(TOOLS, choice, parallel), seed)
    content, calls = read_calls(text)
    check_calls(calls)
    assert text.count("<tool_call>") == len(calls)
    if choice != "auto":
        assert content is None
        assert calls
    if choice is MOVE:
        assert [name for name, _ in calls] == ["move"]
    assert parallel or len(calls) <= 1


SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"answer": {"type": "integer"}, "why": {"type": "string"}}, "required": ["answer"]},
    {"type": "array", "items": {"enum": ["a", 1, None]}, "maxItems": 3},
    {"type": "object", "properties": {"tree": {"$ref": "#/$defs/node"}}, "required": ["tree"], "$defs": {
        "node": {"type": "object", "properties": {"kind": {"const": "leaf"}, "sizes": {"type": "array", "items": POINT}}}}},
    {"oneOf": [{"type": "string", "maxLength": 4}, POINT]},
]  # fmt: skip


@KINDS
@pytest.mark.parametrize("schema", SCHEMAS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_whatever_is_drawn_the_json_matches(
    speakers: dict[str, Speaker], kind: str, schema: dict[str, Any], seed: int
) -> None:
    jsonschema.validate(json.loads(speakers[kind].babble(json_like(schema), seed)), schema)


@KINDS
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_whatever_is_drawn_is_an_object(speakers: dict[str, Speaker], kind: str, seed: int) -> None:
    assert isinstance(json.loads(speakers[kind].babble(an_object(), seed)), dict)


@pytest.mark.parametrize(("choice", "temperature"), [("required", 0.0), ("required", 1.0), (MOVE, 0.0)])
def test_a_small_model_calls_and_ends(speakers: dict[str, Speaker], choice: Any, temperature: float) -> None:
    model, speaker = smollm2(), speakers["text"]
    question = [{"role": "user", "content": "Use a function: what is 13 + 29, and move the point to x = 7."}]
    prompt = speaker.tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    constraint = speaker.constraints.compile(tool_call_grammar(TOOLS, choice, False))
    torch.manual_seed(0)
    state: Any = None

    @torch.no_grad()
    def choose(_: torch.Tensor, tokens: list[int]) -> int:
        nonlocal state
        fed = torch.tensor([tokens[-1:]]) if tokens else prompt["input_ids"]
        out = model(fed, past_key_values=state, use_cache=True)
        state, logits = out.past_key_values, out.logits[0, -1]
        constraint.mask(logits)
        token = int(torch.distributions.Categorical(logits=logits).sample() if temperature else logits.argmax())
        constraint.accept(token)
        return token

    content, calls = read_calls(speaker.say(constraint, choose, 80))
    assert content is None
    assert calls
    check_calls(calls)
