"""Text answers, each against hand-checked outputs."""

import time

import pytest

from eval_jobs.texts import read_text, same_text


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Paris", "Paris"),
        ("  **Paris**  ", "Paris"),
        ("France is in Europe.\nAnswer: Paris", "Paris"),
        ("**Answer:** Paris", "Paris"),
        ("Answer:\nParis", "Paris"),
        ("Answer: Rome?\nNo.\nFinal answer: Paris", "Paris"),
        ("The final answer is Paris", "Paris"),
        (r"So it is $\boxed{\text{Paris}}$.", "Paris"),
        (r"\boxed{\frac{1}{2} a} or so", r"\frac{1}{2} a"),
        ("It ends.\n#### Paris", "Paris"),
        ("I say <answer>\nParis\n</answer> now", "Paris"),
        ("Thinking. So the answer is Paris. It lies on the Seine.", "Paris"),
        ("<think>Answer: Rome</think>Answer: Paris", "Paris"),
        ("<think>Answer: Rome", None),
        ("Answer: Paris\n\nQuestion: And of Italy?\nAnswer: Rome", "Paris"),
        ("One line.\nAnother line.", None),
        ("", None),
    ],
)
def test_read(text: str, answer: str | None) -> None:
    assert read_text(text) == answer


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        ("paris.", "Paris", True),
        ('"New  York"', "new york", True),
        ("The Paris", "Paris", False),
        ("B) Paris", "B", True),
        ("(B)", "B", True),
        ("b", "B", True),
        ("Because", "B", False),
        ("C. Rome", "B", False),
        ("Łódź", "ŁÓDŹ", True),
        ("", "", False),
        ("!", "!", True),
        ("$18", "18", True),
        ("1 8", "18", False),
    ],
)
def test_compare(answer: str, gold: str, same: bool) -> None:
    assert same_text(answer, gold) is same


@pytest.mark.parametrize(
    "piece", ["answer is ", "Answer: ", "<answer>", r"\boxed{", "#### ", "final answer ", "*", "\n"]
)
def test_any_text_takes_linear_time(piece: str) -> None:
    started = time.monotonic()
    read_text(piece * 50_000)
    assert time.monotonic() - started < 5
