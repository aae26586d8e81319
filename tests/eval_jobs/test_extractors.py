"""Extractors, each against hand-checked texts; the harness's known misreads are kept on purpose."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval_jobs.extractors import EXTRACTORS, same_number, score
from eval_jobs.problems import gold_answer

WRITTEN_FOR = {
    "answer": "So it is done.\n**Final Answer:** {}",
    "answer_line": "So it is done.\nAnswer: {}",
    "gsm8k_strict": "So it is done.\n#### {}",
    "cot_strict": "The answer is {}.\n",
    "flexible": "It comes to {} in the end",
    "boxed": r"So it is \boxed{{{}}}.",
    "math_verify": r"So the final answer is $\boxed{{{}}}$.",
}
"""A text each extractor is made for."""


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Answer: 18", "18"),
        ("18 eggs.\nanswer: 18 eggs per day", "18"),
        ("**Answer:** $18.00", "18.00"),
        ("**Answer: 1,800**", "1800"),
        ("> Answer : [18]", "18"),
        ("Answer: -103", "-103"),
        ("Answer: −5", "-5"),
        ("Answer: $-5", "-5"),
        ("Answer: .5", ".5"),
        ("Answer: 18.", "18"),
        ("Answer: 3 * 6 = 18", "18"),
        ("Answer: 3\nWait.\nAnswer: 4", "4"),
        ("Answer: 3\nAnswer: [number]", "3"),
        ("My Answer: 3", None),
        ("The answer is 18", None),
        ("Answer:\n18", None),
        ("", None),
    ],
)
def test_answer_line(text: str, answer: str | None) -> None:
    assert EXTRACTORS["answer_line"].read(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 18", "18"),
        ("#### 1,800.\n#### 7", "1,800."),
        ("#### -5", "-5"),
        ("####18", None),
        ("#### $18", None),
    ],
)
def test_gsm8k_strict(text: str, answer: str | None) -> None:
    assert EXTRACTORS["gsm8k_strict"].read(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 18.", "18"),
        ("The answer is 18. The answer is 7.", "18."),
        ("The answer is 18", "1"),  # the harness wants a character after the number
        ("the answer is 18.", None),
        ("The answer is $18.", None),
    ],
)
def test_cot_strict(text: str, answer: str | None) -> None:
    assert EXTRACTORS["cot_strict"].read(text) == answer


@pytest.mark.parametrize(
    ("text", "answer", "is_18"),
    [
        ("It is 18 in all", "18", True),
        ("It is 18.", "18.", True),
        ("It is $18", "$18", True),
        ("It is $18.00", "$18.00", False),  # misread: not the text "18"
        ("It is 18 (see step 3)", "3", False),  # misread: the last number
        ("It is 18...", "18...", False),  # misread: one full stop is forgiven, not three
        ("It is 18, I think, ..", "..", False),  # misread: punctuation passes for a number
        ("It is 1,8", "1,8", True),  # commas are dropped wherever they stand
        ("eighteen", None, False),
    ],
)
def test_flexible(text: str, answer: str | None, is_18: bool) -> None:
    assert EXTRACTORS["flexible"].read(text) == answer
    assert score(text, "18").correct_by["flexible"] is is_18


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{18}", "18"),
        (r"\boxed{7} no: \boxed{18}", "18"),
        (r"$\boxed{\$1{,}800.50}$", "1800.50"),
        (r"\boxed{\text{about } 18\%}", "18"),
        (r"\boxed{}", None),
        (r"\boxed{18", None),
        ("boxed 18", None),
    ],
)
def test_boxed(text: str, answer: str | None) -> None:
    assert EXTRACTORS["boxed"].read(text) == answer


def test_numbers_are_compared_as_numbers_only_where_that_is_the_convention() -> None:
    by_line = score("Answer: 18.00\n#### 18.00", "18").correct_by
    assert by_line["answer_line"]
    assert not by_line["gsm8k_strict"]
    assert same_number("0.1", "0.10")
    assert not same_number("0.1000000000000000000000000000000001", "0.1")
    assert not same_number("", "18")


def test_absurdly_long_numbers_are_compared_exactly_and_fast() -> None:
    digits = "7" * 200_000
    exact = {
        name: text for name, text in WRITTEN_FOR.items() if name != "math_verify"
    }  # which reads the end of a text only
    started = time.process_time()
    assert all(score(text.format(digits), digits).correct_by[name] for name, text in exact.items())
    assert not any(score(text.format(digits), digits[:-1] + "8").correct_by[name] for name, text in exact.items())
    assert time.process_time() - started < 5


@pytest.mark.parametrize("piece", ["*", "#### ", "1,", "answer", "Answer:", "\\boxed{", "{", "= ", "The answer is 1"])
def test_time_is_linear_in_the_text(piece: str) -> None:
    started = time.process_time()
    score(piece * 50_000, "18")
    assert time.process_time() - started < 2


@settings(deadline=None)  # the first call imports math-verify
@given(st.text(alphabet=st.one_of(st.characters(), st.sampled_from("0123456789.,$-−#\\{}: =*Answer\n"))))
def test_no_text_breaks_an_extractor(text: str) -> None:
    for written in (text, *(form.format(text) for form in WRITTEN_FOR.values())):
        scores = score(written, "18")
        assert scores.answers.keys() == scores.correct_by.keys() == EXTRACTORS.keys()
        assert not any(scores.correct_by[name] for name, answer in scores.answers.items() if answer is None)


@settings(deadline=None, max_examples=50)
@given(st.decimals(allow_nan=False, allow_infinity=False, places=2), st.text(alphabet="abc .\n"))
def test_every_extractor_reads_what_was_written_for_it(number: object, before: str) -> None:
    for name, form in WRITTEN_FOR.items():
        assert score(before + "\n" + form.format(number), str(number)).correct_by[name]


def test_every_gold_answer_of_gsm8k_scores_as_correct(gsm8k_test: Path) -> None:
    files = [gsm8k_test.parent / f"{split}.jsonl" for split in ("train", "test")]
    golds = sorted({str(gold_answer(json.loads(line)["answer"])) for file in files for line in file.open()})
    for name, form in WRITTEN_FOR.items():
        extractor = EXTRACTORS[name]
        for gold in golds[:: 25 if name == "math_verify" else 1]:
            for spelled in (gold, f"{int(gold):,}"):
                answer = extractor.read(form.format(spelled))
                assert answer is not None, (name, spelled)
                assert extractor.agrees(answer, gold), (name, spelled)


def test_the_gold_rationale_is_read_by_the_strict_extractor(gsm8k_test: Path) -> None:
    for line in gsm8k_test.open():
        solution = json.loads(line)["answer"]
        for name in ("gsm8k_strict", "answer"):
            answer = EXTRACTORS[name].read(solution)
            assert answer is not None, (name, solution)
            assert EXTRACTORS[name].agrees(answer, str(gold_answer(solution))), (name, answer, solution)
