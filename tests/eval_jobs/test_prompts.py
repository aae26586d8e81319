"""Prompts: messages, and a hash that changes with the text."""

from dataclasses import replace

from eval_jobs.prompts import ANSWER_LINE, PROMPTS, Prompt


def test_the_question_goes_in_as_it_is() -> None:
    (message,) = ANSWER_LINE.messages("What is {x} % {question}?")
    assert message["role"] == "user"
    assert message["content"].endswith("Problem: What is {x} % {question}?")
    assert "Answer: [number]" in message["content"]


def test_a_system_message_comes_first() -> None:
    prompt = Prompt("p", 1, user="{question}", system="Be brief.")
    assert [message["role"] for message in prompt.messages("Why?")] == ["system", "user"]


def test_an_edit_changes_the_hash() -> None:
    assert PROMPTS["answer-line"].hash == ANSWER_LINE.hash
    assert replace(ANSWER_LINE, user=ANSWER_LINE.user + " ").hash != ANSWER_LINE.hash
    assert replace(ANSWER_LINE, system="").hash != ANSWER_LINE.hash
