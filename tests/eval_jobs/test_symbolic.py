"""math-verify as an extractor: the library's own verdicts, in any thread, in bounded time."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from math_verify import parse, verify

from eval_jobs.symbolic import MAX_LENGTH, read_symbolic, same_expression

TEXTS = [
    "Answer: 18",
    "The final answer is $\\boxed{18}$.",
    "#### 18",
    "\\boxed{\\frac{36}{2}}",
    "$x = 18$",
    "Answer: 3 * 6",
    "18.00",
    "Answer: 1,8",
    "Answer: 1800%",
    "\\boxed{50\\%}",
    "so 3 * 6 = 18 and 2 more",
    "\\boxed{17}",
    "eighteen",
    "",
    "Answer: -18",
    "Answer: 2^4 + 2",
    "**18**",
    "\\boxed{\\text{18 apples}}",
    "$18$ or $20$",
    "\\boxed{18, 20}",
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_verdict_is_the_librarys(text: str) -> None:
    gold, answer = parse("18", parsing_timeout=None), parse(text, parsing_timeout=None)
    found = read_symbolic(text)
    assert (found is not None and same_expression(found, "18")) is verify(gold, answer, timeout_seconds=None)


def test_it_reads_in_a_thread() -> None:
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(read_symbolic, "The answer is $\\boxed{18}$").result() == "18"


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{9^{9^{9}}}",
        "Answer: 9^9^9",
        "9**9**9",
        "\\boxed{99999999!}",
        "$((9^9)^9)^9$",
        "\\boxed{\\binom{9999999}{4999999}}",
        "$9^{99999999}$",
        "$(99!)!$",
        "$\\sum_{i=1}^{9999999} i^2$",
        "Answer: 1e999999999",
        "$" + "(" * 400 + "1" + ")" * 400 + "$",
        "$" + "-" * 900 + "1$",
        "{" * 50_000,
        "$" * 50_000,
        "\\boxed{" * 20_000,
        "1+" * 50_000,
        "7" * 200_000,
    ],
)
def test_time_is_bounded(text: str) -> None:
    read_symbolic("Answer: 1")  # imports the library
    started = time.process_time()
    found = read_symbolic(text)
    assert found is None or same_expression(found, "18") is False
    assert time.process_time() - started < 5


def test_only_the_end_of_a_long_text_is_read() -> None:
    assert read_symbolic("Answer: 9^9^9" + " word" * MAX_LENGTH + "\nAnswer: 18") == "18"
