"""What a text may be that follows `structured_outputs`, and that its older spellings are the same."""

import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from serve_app.engines.constraints import Constraints
from serve_app.errors import RequestError
from serve_app.openai_api.chat import ChatRequest
from serve_app.openai_api.completions import CompletionRequest
from serve_app.openai_api.reply_parser import Reasoning
from serve_app.openai_api.structured_outputs import StructuredOutputs
from tests.serve_app import tiny
from tests.serve_app.openai_api.test_grammars import Speaker

SPEAKER = Speaker(tiny.tokenizer(), tiny.EOS)
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
GBNF = 'root ::= "SELECT " column\ncolumn ::= "a" | "b"'
LARK = 'start: "SELECT " column\ncolumn: "a" | "b"'


def may_say(outputs: dict[str, object], text: str, reasoning: Reasoning = "none") -> bool:
    return SPEAKER.may_say(StructuredOutputs.model_validate(outputs).to_grammar("x", reasoning=reasoning), text)


@pytest.mark.parametrize(
    ("outputs", "said", "not_said"),
    [
        ({"choice": ["yes", 'no "é" 🚀', "a\nb"]}, ["yes", 'no "é" 🚀', "a\nb"], ["", "ye", "yes.", "no"]),
        ({"regex": r"[ab]{2}/\d"}, ["ab/1", "aa/9"], ["ab1", "a/1", "ab/12"]),
        ({"regex": r"^x\$$"}, ["x$"], ["x", "^x$"]),
        ({"regex": "a|^b"}, ["a"], ["ab"]),
        ({"regex": "a\nb/"}, ["a\nb/"], ["anb/"]),
        ({"json": SCHEMA}, ['{"n": 1}'], ['{"n": "1"}', "{}"]),
        ({"json": json.dumps(SCHEMA)}, ['{"n": 1}'], ['{"n": "1"}', "{}"]),
        ({"json_object": True}, ["{}", '{"a": [1]}'], ["[]", "1"]),
        ({"grammar": GBNF}, ["SELECT a", "SELECT b"], ["SELECT c", "SELECT "]),
        ({"grammar": LARK}, ["SELECT a", "SELECT b"], ["SELECT c", "SELECT "]),
    ],
)
def test_what_may_be_said(outputs: dict[str, object], said: list[str], not_said: list[str]) -> None:
    assert [text for text in said if not may_say(outputs, text)] == []
    assert [text for text in not_said if may_say(outputs, text)] == []


@pytest.mark.parametrize(
    "outputs", [{"choice": ["yes", "no"]}, {"regex": "yes|no"}, {"grammar": 'start: "yes" | "no"'}]
)
def test_thoughts_come_before(outputs: dict[str, object]) -> None:
    assert may_say(outputs, "<think>hm</think>\n\nyes", "possible")
    assert may_say(outputs, "no", "possible")
    assert may_say(outputs, "hm</think>yes", "started")
    assert not may_say(outputs, "yes", "started")


@given(st.text(st.sampled_from("ab/\\n.$^[]()é\n"), min_size=1, max_size=8))
@example("$")
@example("\\$")
@settings(deadline=None, max_examples=60)
def test_an_escaped_text_is_a_regular_expression_for_itself_alone(text: str) -> None:
    assert may_say({"regex": re.escape(text)}, text)
    assert not may_say({"regex": re.escape(text)}, text + "x")


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ({"regex": "[.*"}, "unclosed character class"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"grammar": "root ::= select_statementinvalid\n"}, "select_statementinvalid"),
        ({"grammar": "start: ("}, "x: "),
        ({"json": {"type": "object", "properties": {"a": "b"}, "required": ["a"]}}, "x: "),
    ],
)
def test_what_cannot_be_followed_is_refused_with_the_reason(outputs: dict[str, object], words: str) -> None:
    constraints = Constraints(SPEAKER.tokenizer, len(SPEAKER.tokenizer), [tiny.EOS])
    with pytest.raises(RequestError) as caught:
        constraints.compile(StructuredOutputs.model_validate(outputs).to_grammar("x"))
    assert caught.value.param == "x"
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"structured_outputs": {}}, "found none"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "found regex, choice"),
        ({"structured_outputs": {"regex": {"1": "a"}}}, "string"),
        ({"structured_outputs": {"choice": [""]}}, "empty text"),
        ({"structured_outputs": {"json": "{"}}, "not valid JSON"),
        ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "Extra inputs"),
        ({"structured_outputs": {"regex": "a"}, "guided_regex": "a"}, "another name for it"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice, guided_regex"),
        ({"guided_choice": ["a"], "ignore_eos": True}, "not allowed with a grammar"),
    ],
)
def test_what_makes_no_sense_is_refused(extra: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        CompletionRequest.model_validate({"model": "m", "prompt": "p", **extra})


@pytest.mark.parametrize(
    ("older", "now"),
    [
        ({"guided_json": SCHEMA}, {"json": SCHEMA}),
        ({"guided_json": json.dumps(SCHEMA)}, {"json": SCHEMA}),
        ({"guided_regex": "a+"}, {"regex": "a+"}),
        ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
        ({"guided_grammar": LARK}, {"grammar": LARK}),
    ],
)
def test_older_spellings_mean_the_same(older: dict[str, object], now: dict[str, object]) -> None:
    request = ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "?"}], **older})
    assert request.structured is not None
    param, outputs = request.structured
    assert param in older
    assert outputs.to_grammar("x") == StructuredOutputs.model_validate(now).to_grammar("x")
