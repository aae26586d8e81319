import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.openai_api.reply_parser import (
    ContentDelta,
    Reasoning,
    ReasoningDelta,
    ReplyParser,
    ReplyPart,
    ToolCallArguments,
    ToolCallStart,
    assemble,
    reasoning_mode,
)
from tests.serve_app.openai_api.templates import LLAMA, QWEN

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def parse(*pieces: str, tools: bool = True, reasoning: Reasoning = "none") -> list[ReplyPart]:
    parser = ReplyParser(tools=tools, reasoning=reasoning)
    return [*(part for piece in pieces for part in parser.feed(piece)), *parser.finish()]


def read(*pieces: str, tools: bool = True, reasoning: Reasoning = "none") -> dict[str, Any]:
    """A message without what is always there, its calls as (name, arguments)."""
    message: dict[str, Any] = {**assemble(parse(*pieces, tools=tools, reasoning=reasoning))}
    assert (message.pop("role"), message.pop("refusal")) == ("assistant", None)
    if "tool_calls" in message:
        ids = [call["id"] for call in message["tool_calls"]]
        assert len(set(ids)) == len(ids)
        assert all(call_id.startswith("call_") and call_id == call_id.lower() for call_id in ids)
        called = [call["function"] for call in message["tool_calls"]]
        message["tool_calls"] = [(function["name"], function["arguments"]) for function in called]
    return message


ADD = ("add", '{"a": 1}')
TRICKY = '{"a": "}</tool_call>\\"{", "b": [{"c": {}}]}'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Four.\n", "Four.\n", []),
        (CALL, None, [ADD]),
        (f"\n\n{CALL}\n", None, [ADD]),
        (f"I add.\n\n{CALL}\n\n {CALL}<tool_call>{{}}</tool_call>", "I add.<tool_call>{}</tool_call>", [ADD, ADD]),
        (f"{CALL}\nDone. ", "\nDone. ", [ADD]),
        ('<tool_call>{"name":"add","arguments":' + TRICKY + "}</tool_call>", None, [("add", TRICKY)]),
        ('<tool_call> {"arguments": {"b": "</tool_call>", "a": 1}, "name": "add"} </tool_call>', None,
         [("add", '{"b": "</tool_call>", "a": 1}')]),
        ('<tool_call>{"id": 3, "name": "add", "arguments": {}}</tool_call>', None, [("add", "{}")]),
        ('<tool_call>{"name": "add", "arguments": {}, "id": {"x": "}"}}</tool_call>', None, [("add", "{}")]),
        # a closing bracket or the closing marker left out, or too much of them
        ('<tool_call>{"name": "add", "arguments": {"a": 1}\n</tool_call>Yes', "Yes", [ADD]),
        ('<tool_call>{"name": "add", "arguments": {"a": 1\n</tool_call>', None, [("add", '{"a": 1\n')]),
        ('<tool_call>{"name": "add", "arguments": {"a": "1\n</tool_call>Yes', "Yes", [("add", '{"a": "1\n')]),
        (f"{CALL[:-12]}\n{CALL}", None, [ADD, ADD]),
        (f"{CALL[:-5]}", None, [ADD]),
        (f"{CALL[:-14]}", None, [ADD]),
        (CALL.replace("}}", "}}}"), "}\n</tool_call>", [ADD]),
        # cut short
        (CALL[:43], None, [("add", '{"')]),
        (CALL[:40], CALL[:40], []),
        ("1 <tool", "1 <tool", []),
        # no calls
        ("Write <tool_call> first", "Write <tool_call> first", []),
        ("a <tool_call>\n{'name': 'add'}\n</tool_call> b", "a <tool_call>\n{'name': 'add'}\n</tool_call> b", []),
        ('<tool_call>{"name": "add"}</tool_call>', '<tool_call>{"name": "add"}</tool_call>', []),
        ('<tool_call>{"arguments": {"a": NaN}, "name": "a"}', '<tool_call>{"arguments": {"a": NaN}, "name": "a"}', []),
        ('<tool_call>{"name": "a b", "arguments": {}}', '<tool_call>{"name": "a b", "arguments": {}}', []),
        ('<tool_call>{"name": "a", "arguments": "x"}', '<tool_call>{"name": "a", "arguments": "x"}', []),
        (f"<tool_call>{CALL}", "<tool_call>", [ADD]),
        ("", "", []),
    ],
)  # fmt: skip
def test_replies(text: str, content: str | None, calls: list[tuple[str, str]]) -> None:
    expected = {"content": content} | ({"tool_calls": calls} if calls else {})
    assert read(text) == expected
    assert read(*text) == expected


@pytest.mark.parametrize(
    ("mode", "text", "reasoning", "content"),
    [
        ("started", "\nHm.\n\nSo.\n</think>\n\nFour.", "Hm.\n\nSo.", "Four."),
        ("possible", "\n<think>\nHm. </think>Four.</think>", "Hm. ", "Four.</think>"),
        ("possible", "<think>\n\n</think>\n\nFour.", None, "Four."),
        ("possible", "Four. <think>Hm.</think>", None, "Four. <think>Hm.</think>"),
        ("possible", "\n <thi", None, "\n <thi"),
        ("started", "Hm <tool_call> </thin", "Hm <tool_call> </thin", ""),
        ("started", "Hm.\n", "Hm.", ""),
        ("none", "<think>Hm.</think>Four.", None, "<think>Hm.</think>Four."),
    ],
)
def test_thoughts(mode: Reasoning, text: str, reasoning: str | None, content: str) -> None:
    expected = {"content": content} | ({"reasoning_content": reasoning} if reasoning else {})
    assert read(text, reasoning=mode) == expected
    assert read(*text, reasoning=mode) == expected


def test_thoughts_before_calls() -> None:
    called = {"content": None, "reasoning_content": "Hm.", "tool_calls": [ADD]}
    assert read(f"<think>\nHm.\n</think>\n\n{CALL}", reasoning="possible") == called


def test_without_tools_a_call_is_text() -> None:
    assert read(CALL, tools=False) == {"content": CALL}


def test_a_call_is_sent_as_it_comes() -> None:
    parser = ReplyParser(tools=True, reasoning="none")
    assert parser.feed("I add. <tool") == [ContentDelta("I add.")]
    assert parser.feed('_call>\n{"name": "add", "arguments": ') == []
    start, *arguments = parser.feed('{"a"')
    assert isinstance(start, ToolCallStart)
    assert (start.index, start.name) == (0, "add")
    assert arguments == [ToolCallArguments(0, '{"a"')]
    assert parser.feed(': "<') == [ToolCallArguments(0, ': "<')]
    assert parser.feed('"}}\n') == [ToolCallArguments(0, '"}')]
    assert parser.feed('</tool_call>\n<tool_call>{"name": "add", "arguments": {}')[1:] == [ToolCallArguments(1, "{}")]
    assert parser.finish() == []


def test_thoughts_are_sent_as_they_come() -> None:
    parser = ReplyParser(tools=True, reasoning="started")
    assert parser.feed("\nHm") == [ReasoningDelta("Hm")]
    assert parser.feed(".\n\n</th") == [ReasoningDelta(".")]
    assert parser.feed("e") == [ReasoningDelta("\n\n</the")]
    assert parser.feed("\n</think>\n") == []
    assert parser.feed("\nFour.") == [ContentDelta("Four.")]


def test_how_a_reply_begins() -> None:
    assert reasoning_mode(QWEN, "<|im_start|>assistant\n") == "possible"
    assert reasoning_mode(QWEN, "<|im_start|>assistant\n<think>\n") == "started"
    assert reasoning_mode(QWEN, "<|im_start|>assistant\n<think>\n\n</think>\n\n") == "none"
    assert reasoning_mode(LLAMA, "[assistant]") == "none"


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<think>", "</think>", "\n", " ", "<", "{", "}", "[", "]", '"', "\\", ",", "é", "x", CALL,
    '{"name": "add", "arguments": ', '{"arguments": {"a": "b"}, "name": "add"}', "\\u00e9", '"a": "', "</tool", "\x00",
]  # fmt: skip
NOISE = st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join)


@given(NOISE, st.data(), st.sampled_from(["started", "possible", "none"]), st.booleans())
def test_a_reply_says_the_same_however_it_is_split(
    text: str, data: st.DataObject, mode: Reasoning, tools: bool
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = read(text, tools=tools, reasoning=mode)
    assert read(*pieces, tools=tools, reasoning=mode) == whole
    assert read(*text, tools=tools, reasoning=mode) == whole
    if mode == "none" and "tool_calls" not in whole:
        assert whole["content"] == text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
CALLED = st.tuples(st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True), st.dictionaries(st.text(), JSON, max_size=3))


@given(st.text().filter(lambda said: said == said.rstrip()), st.lists(CALLED, max_size=4), st.booleans(), st.data())
def test_no_call_is_lost(said: str, calls: list[tuple[str, Any]], name_first: bool, data: st.DataObject) -> None:
    gap = data.draw(st.sampled_from(["", "\n", " \n\n"]))
    indent = data.draw(st.sampled_from([None, 2]))
    ascii_only = data.draw(st.booleans())
    blocks = []
    for name, arguments in calls:
        call = {"name": name, "arguments": arguments} if name_first else {"arguments": arguments, "name": name}
        blocks.append(f"<tool_call>\n{json.dumps(call, indent=indent, ensure_ascii=ascii_only)}\n</tool_call>")
    text = gap.join([said, *blocks])
    message = read(*text)
    assert (message["content"] or "") == said
    assert [(name, json.loads(arguments)) for name, arguments in message.get("tool_calls", [])] == calls
