"""Prompts: messages, and a hash that changes with the text."""

from dataclasses import replace
from pathlib import Path

import pytest

from eval_jobs.problems import Problem
from eval_jobs.prompts import ANSWER_LINE, GSM8K, PROMPTS, Prompt, PromptError, choose_prompt

SHOTS = tuple(Problem(f"t{n}", n, f"1 + {n}?", f"Easy.\n#### {n + 1}", str(n + 1)) for n in (1, 2))
PROBLEM = Problem("p", 1, "What is {x} % {question}?", "#### 4", "4", SHOTS)


def test_the_question_goes_in_as_it_is() -> None:
    message = ANSWER_LINE.messages(replace(PROBLEM, shots=()))[0]
    assert message["role"] == "user"
    assert message["content"].endswith("Problem: What is {x} % {question}?")
    assert "Answer: [number]" in message["content"]


def test_shots_are_turns_of_their_own() -> None:
    assert GSM8K.messages(PROBLEM) == [
        {"role": "user", "content": "Question: 1 + 1?\nAnswer:"},
        {"role": "assistant", "content": "Easy.\n#### 2"},
        {"role": "user", "content": "Question: 1 + 2?\nAnswer:"},
        {"role": "assistant", "content": "Easy.\n#### 3"},
        {"role": "user", "content": "Question: What is {x} % {question}?\nAnswer:"},
    ]


def test_a_prefix_comes_before_the_last_question_only() -> None:
    messages = GSM8K.messages(PROBLEM, "Hurry up!")
    assert [message["content"].startswith("Hurry up!\n\nQuestion:") for message in messages] == [False] * 4 + [True]


def test_a_system_message_comes_first() -> None:
    prompt = Prompt("p", 1, user="{question}", system="Be brief.")
    assert [message["role"] for message in prompt.messages(replace(PROBLEM, shots=()))] == ["system", "user"]


def test_an_edit_changes_the_hash_and_the_way_of_reading_does_not() -> None:
    assert PROMPTS["answer-line"].hash == ANSWER_LINE.hash
    assert replace(ANSWER_LINE, user=ANSWER_LINE.user + " ").hash != ANSWER_LINE.hash
    assert replace(ANSWER_LINE, system="").hash != ANSWER_LINE.hash
    assert replace(ANSWER_LINE, stop=("x",)).hash != ANSWER_LINE.hash
    assert replace(ANSWER_LINE, extractor="boxed").hash == ANSWER_LINE.hash


def test_a_file_is_a_prompt(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("Solve: {question}\n")
    prompt = choose_prompt("answer-line", file, system="Be brief.")
    assert (prompt.name, prompt.user, prompt.system) == ("mine", "Solve: {question}", "Be brief.")
    file.write_text("Solve it.")
    with pytest.raises(PromptError, match=r"mine\.txt has no \{question\}"):
        choose_prompt("answer-line", file)
    with pytest.raises(PromptError, match="cannot be read"):
        choose_prompt("answer-line", tmp_path / "none.txt")
