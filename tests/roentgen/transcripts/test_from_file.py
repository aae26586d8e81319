import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roentgen.transcripts import Transcript, TranscriptError
from roentgen.transcripts.from_file import read_file

WORDS = st.text(min_size=1)
ROLES = st.sampled_from(["system", "developer", "user", "assistant"])
LABELS = st.dictionaries(
    st.text(),
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
)
SHAPES = st.one_of(
    st.fixed_dictionaries({"text": WORDS}),
    st.fixed_dictionaries({"prompt": WORDS, "completion": st.text()}),
    st.lists(st.fixed_dictionaries({"role": ROLES, "content": st.text()}), min_size=2).map(lambda m: {"messages": m}),
)


def write(folder: Path, *lines: str | dict[str, object]) -> Path:
    file = folder / "texts.jsonl"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def said(transcript: Transcript) -> dict[str, object]:
    """Spell a transcript as the line that it came from."""
    if isinstance(transcript.prompt, str):
        if transcript.completion is None:
            return {"text": transcript.prompt}
        return {"prompt": transcript.prompt, "completion": transcript.completion}
    answer = [] if transcript.completion is None else [{"role": "assistant", "content": transcript.completion}]
    return {"messages": [*transcript.prompt, *answer]}


@given(lines=st.lists(st.tuples(SHAPES, LABELS), min_size=1, max_size=5), name=st.text(min_size=1, max_size=200))
def test_nothing_of_a_line_is_lost(tmp_path_factory: pytest.TempPathFactory, lines: Any, name: str) -> None:
    bodies = [shape | {"labels": labels} for shape, labels in lines]
    bodies[0]["id"] = f"#{name}"[:200]
    file = write(tmp_path_factory.mktemp("texts"), *bodies)
    transcripts = read_file(file)
    assert [said(t) | {"labels": t.labels} for t in transcripts] == [
        {key: value for key, value in body.items() if key != "id"} for body in bodies
    ]
    assert transcripts == read_file(file)
    assert [t.key.problem_id for t in transcripts] == [bodies[0]["id"], *map(str, range(2, len(lines) + 1))]
    assert len({t.key.config_hash for t in transcripts}) == 1


def test_how_a_completion_ended(tmp_path: Path) -> None:
    ask, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
    file = write(
        tmp_path,
        {"messages": [ask, answer]},
        {"messages": [ask, answer], "finish_reason": "length"},
        {"prompt": "?", "completion": "!"},
        {"prompt": "?", "completion": "!", "finish_reason": "stop"},
        {"messages": [ask, answer, ask]},
    )
    transcripts = read_file(file)
    assert [t.finish_reason for t in transcripts] == ["stop", "length", "length", "stop", "length"]
    assert [t.completion for t in transcripts] == ["!", "!", "!", "!", None]


def test_blank_lines_are_no_lines_but_count(tmp_path: Path) -> None:
    assert [t.name for t in read_file(write(tmp_path, "", {"text": "a"}, "  ", {"text": "b", "id": 7}))] == ["2", "7"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "a"', "not JSON: "),
        ("[1]", "a line must be a JSON object, not [1]"),
        ({}, "text, or prompt and completion, or messages; this one has none of them"),
        ({"text": ""}, "text: String should have at least 1 character (given: '')"),
        ({"text": 3}, "text: Input should be a valid string (given: 3)"),
        ({"text": "a", "prompt": "b"}, "this one has prompt and text"),
        ({"prompt": "a"}, "this one has prompt"),
        ({"txt": "a"}, "txt: Extra inputs are not permitted (given: 'a')"),
        ({"text": "a", "labels": {"x": [1]}}, "labels.x: a label is a text, a number, true, false or null"),
        ({"text": "a", "labels": {"x": float("nan")}}, "labels.x: NaN"),
        ({"text": "a", "labels": {"x": float("-inf")}}, "labels.x: -Infinity"),
        ({"text": "a \ud83d"}, "text: an unpaired surrogate"),
        ({"text": "a", "labels": {"x": "\ud83d"}}, "labels.x: an unpaired surrogate"),
        ({"text": "a", "labels": {"\ud83d": 1}}, "labels: its key"),
        ({"text": "a", "finish_reason": "stop"}, "finish_reason requires a completion"),
        (
            {"prompt": "a", "completion": "b", "finish_reason": "eos"},
            "finish_reason: Input should be 'stop' or 'length'",
        ),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "needs at least one before it"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role: Input should be 'system', 'developer', "),
        ({"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
        ({"text": "b", "id": "first"}, "id: 'first' is already used by line 1"),
        ({"text": "b", "id": ""}, "id: String should have at least 1 character"),
        ({"text": "b", "id": "x" * 201}, "id: String should have at most 200 characters"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, line: str, words: str) -> None:
    file = write(tmp_path, {"text": "a", "id": "first"}, line)
    with pytest.raises(TranscriptError) as raised:
        read_file(file)
    assert str(raised.value).startswith(f"{file}, line 2: ")
    assert words in str(raised.value)


def test_bytes_that_are_not_text_are_named(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(TranscriptError, match="line 1"):
        read_file(file)


def test_no_file_and_no_lines(tmp_path: Path) -> None:
    with pytest.raises(TranscriptError, match=r"texts\.jsonl cannot be read: No such file"):
        read_file(tmp_path / "texts.jsonl")
    with pytest.raises(TranscriptError, match="has no lines"):
        read_file(write(tmp_path, "", ""))
