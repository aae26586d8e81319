"""Prompts: messages, and a hash that changes with the text."""

from dataclasses import replace
from pathlib import Path

import pytest

from eval_jobs.problems import GSM8K_FOLDER_VARIABLE, Problem
from eval_jobs.prompts import (
    ANSWER_LINE,
    GSM8K,
    GSM8K_COT,
    PROMPTS,
    Prompt,
    PromptError,
    Shot,
    check_prompt,
    choose_prompt,
)
from eval_jobs.selection import Selection, load_problems

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


def test_the_shots_of_gsm8k_cot_are_eight_and_the_same() -> None:
    messages = GSM8K_COT.messages(replace(PROBLEM, shots=()))
    assert [message["role"] for message in messages] == ["user", "assistant"] * 8 + ["user"]
    assert messages[0]["content"] == (
        "Q: There are 15 trees in the grove. Grove workers will plant trees in the grove today. After they are done, there "
        "will be 21 trees. How many trees did the grove workers plant today?\nA:"
    )
    assert messages[15]["content"] == (
        "Olivia had 23 dollars. 5 bagels for 3 dollars each will be 5 x 3 = 15 dollars. So she has 23 - 15 dollars left. "
        "23 - 15 is 8. The answer is 8."
    )
    assert messages[-1]["content"] == "Q: What is {x} % {question}?\nA:"
    for shot, answer in zip(GSM8K_COT.fixed_shots, ("6", "5", "39", "8", "9", "29", "33", "8"), strict=True):
        assert shot.solution.endswith(f" The answer is {answer}.")


def test_fixed_shots_are_the_first_of_the_training_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f'{{"question": "{n} + 1?", "answer": "Easy.\\n#### {n + 1}"}}\n' for n in range(1, 6)]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    monkeypatch.setenv(GSM8K_FOLDER_VARIABLE, str(tmp_path))
    prompt = choose_prompt("gsm8k", fixed_shots=3)
    assert (prompt.shots, prompt.fixed_shots) == (
        0,
        tuple(Shot(f"{n} + 1?", f"Easy.\n#### {n + 1}") for n in (1, 2, 3)),
    )
    assert len({prompt.hash, GSM8K.hash, choose_prompt("gsm8k", fixed_shots=2).hash}) == 3
    with pytest.raises(PromptError, match="--fixed-shots: 6 exceeds the 5 of GSM8K's training set"):
        choose_prompt("gsm8k", fixed_shots=6)


def test_fixed_shots_are_the_first_of_the_prompts_own() -> None:
    assert choose_prompt("gsm8k_cot", fixed_shots=2).fixed_shots == GSM8K_COT.fixed_shots[:2]
    assert not choose_prompt("gsm8k_cot", fixed_shots=0).fixed_shots
    with pytest.raises(PromptError, match="--fixed-shots: 9 exceeds the 8 of the prompt gsm8k_cot"):
        choose_prompt("gsm8k_cot", fixed_shots=9)


def test_no_shot_has_the_answer() -> None:
    """As when problems come from the set that shots are drawn from."""
    one = replace(GSM8K_COT, fixed_shots=(Shot("1 + 1?", "The answer is 2."), Shot("1 + 2?", "The answer is 3.")))
    for posed in (replace(PROBLEM, shots=(), question="1 + 2?"), replace(PROBLEM, question="1 + 2?")):
        said = [message["content"] for message in one.messages(posed)]
        assert said.count("Q: 1 + 2?\nA:") == 1
        assert said[-1] == "Q: 1 + 2?\nA:"


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


def test_prompts_keep_the_hashes_that_runs_have() -> None:
    assert {name: PROMPTS[name].hash for name in ("answer-line", "answer-line-1", "gsm8k", "gsm8k_cot_zeroshot")} == {
        "answer-line": "4160ef157d88a8bc",
        "answer-line-1": "f29ff74bc8c7ddc0",
        "gsm8k": "f55ce0e9278b9a0a",
        "gsm8k_cot_zeroshot": "1e4d1fe2f11b74a1",
    }


def test_a_file_is_a_prompt(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("Solve: {question}\n")
    prompt = choose_prompt("answer-line", file, system="Be brief.")
    assert (prompt.name, prompt.user, prompt.system) == ("mine", "Solve: {question}", "Be brief.")
    file.write_text("Solve it.")
    with pytest.raises(PromptError, match=r"mine\.txt lacks \{question\}"):
        choose_prompt("answer-line", file)
    with pytest.raises(PromptError, match="cannot be read"):
        choose_prompt("answer-line", tmp_path / "none.txt")


CAPITAL = Problem("c", 1, "The capital of Peru?", "Lima", "Lima", fields={"choices": ["Lima", "Rome"], "hint": "L"})


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("{question} {{hint}}", "The capital of Peru? {L}"),
        ("Q: {question} ({hint}) {other} \\frac{a}{b}", "Q: The capital of Peru? (L) {other} \\frac{a}{b}"),
        ("{question}\n{choices}", "The capital of Peru?\nLima\nRome"),
        ("{{ question }}{% for choice in choices %} [{{ loop.index }}] {{ choice }}{% endfor %}",
         "The capital of Peru? [1] Lima [2] Rome"),
    ],
)  # fmt: skip
def test_a_text_shows_the_fields_of_a_record(text: str, asked: str) -> None:
    assert choose_prompt(text).messages(CAPITAL) == [{"role": "user", "content": asked}]


def test_a_template_that_cannot_be_filled_is_told_which_fields_there_are() -> None:
    with pytest.raises(
        PromptError, match="cannot be filled for c: 'options' is undefined; the problem has choices, hint, quest"
    ):
        check_prompt(choose_prompt("{{ question }} {{ options }}"), [CAPITAL])
    with pytest.raises(PromptError, match=r"--prompt: not a Jinja template: .* \(line 1\)"):
        choose_prompt("{% for x %}")


def test_a_function_poses_problems(tmp_path: Path) -> None:
    file = tmp_path / "prompts_under_test.py"
    file.write_text(
        "from eval_jobs.prompts import Prompt\n"
        "def text(problem):\n    return f'{problem.question} {problem.fields[\"hint\"]}'\n"
        "def talk(problem):\n    return [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Yes?'},\n"
        "        {'role': 'user', 'content': problem.question}]\n"
        "SHORT = 'Briefly: {question}'\nWHOLE = Prompt('whole', 2, '{question}', system='Be brief.')\nNUMBER = 3\n"
        "def nothing(problem):\n    return None\n"
        "def roles(problem):\n    return [{'role': 'human', 'content': 'x'}]\n"
        "def silent(problem):\n    return [{'role': 'system', 'content': 'x'}]\n"
    )
    text = choose_prompt(f"{file}:text", system="Be nice.")
    assert text.messages(CAPITAL, "Hurry!") == [
        {"role": "system", "content": "Be nice."},
        {"role": "user", "content": "Hurry!\n\nThe capital of Peru? L"},
    ]
    talk = choose_prompt(f"{file}:talk")
    assert [m["content"] for m in talk.messages(CAPITAL, "Hurry!")] == ["Hi", "Yes?", "Hurry!\n\nThe capital of Peru?"]
    assert choose_prompt(f"{file}:SHORT").messages(CAPITAL)[0]["content"] == "Briefly: The capital of Peru?"
    assert choose_prompt(f"{file}:WHOLE").hash == Prompt("whole", 2, "{question}", system="Be brief.").hash
    assert len({one.hash for one in (text, talk, choose_prompt(f"{file}:text"))}) == 3
    for name, said in (
        (
            "nothing",
            r"nothing returned None \(NoneType\) for c; allowed are a text, the user message, and a list of messages",
        ),
        ("roles", "with a role of system, developer, user, assistant"),
        ("silent", "silent returned no user message for c"),
    ):
        with pytest.raises(PromptError, match=said):
            check_prompt(choose_prompt(f"{file}:{name}"), [CAPITAL])
    with pytest.raises(PromptError, match=r"NUMBER is 3 \(int\); allowed are a text, a Prompt, and a function"):
        choose_prompt(f"{file}:NUMBER")
    with pytest.raises(PromptError, match=r"'gsm9k' is unknown; allowed are answer-line, .*Did you mean gsm8k\?"):
        choose_prompt("gsm9k")


def test_shots_come_from_any_source(tmp_path: Path) -> None:
    file = tmp_path / "solved.jsonl"
    file.write_text("".join(f'{{"question": "{n} + 0?", "answer": {n}, "hint": "{n}"}}\n' for n in range(3)))
    prompt = choose_prompt("{question} ({hint})", fixed_shots=2, shots_source=str(file))
    assert [message["content"] for message in prompt.messages(CAPITAL)] == [
        "0 + 0? (0)", "#### 0", "1 + 0? (1)", "#### 1", "The capital of Peru? (L)",
    ]  # fmt: skip
    drawn = choose_prompt("{question}", drawn_shots=2, shots_source=str(file))
    assert (drawn.shots, drawn.shots_source) == (2, str(file))
    one = Selection(source=lambda: [{"question": "x", "answer": "y"}], samples=1, shots=2, shots_source=str(file))
    (posed,) = load_problems(one)
    assert [message["role"] for message in drawn.messages(posed)] == ["user", "assistant"] * 2 + ["user"]
    with pytest.raises(PromptError, match=rf"--fixed-shots: 4 exceeds the 3 of {file}"):
        choose_prompt("{question}", fixed_shots=4, shots_source=str(file))
