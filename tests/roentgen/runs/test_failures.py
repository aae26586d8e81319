"""Kinds of failures: messages that differ in numbers and names only are counted together, others are not."""

import pytest

from roentgen.runs.failures import OTHERWISE, Failures, advice, kind_of


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("503: 12 requests are waiting", "503: 140 requests are waiting", True),
        ("500: rollout 'a1' failed", "500: rollout 'b2' failed", True),
        ("500: request 3f9c2ab1 failed", "500: request 00bd7e42 failed", True),
        ("500: it took 3.25 s", "500: it took 1,204 s", True),
        ("503: busy", "500: busy", False),
        ("500: out of memory", "500: rows are not finite", False),
        ("no answer within 5 s (--request-timeout)", "503: busy", False),
    ],
)
def test_a_kind_is_what_messages_have_in_common(one: str, other: str, same: bool) -> None:
    assert (kind_of(one) == kind_of(other)) is same


def test_the_commonest_comes_first_with_its_first_message() -> None:
    failures = Failures()
    for number, message in enumerate(["500: broken", "503: 3 waiting", "500: other", "503: 4 waiting"], start=1):
        failures.add(f"gsm8k_{number:04}", message)
    found = failures.commonest_first()
    assert [(f.count, f.message, f.sample_id) for f in found] == [
        (2, "503: 3 waiting", "gsm8k_0002"), (1, "500: broken", "gsm8k_0001"), (1, "500: other", "gsm8k_0003"),
    ]  # fmt: skip
    assert failures.describe_last() == "the last with: 503: 4 waiting"
    failures.add("gsm8k_0005", "500: other")
    failures.add("gsm8k_0006", "503: 5 waiting")
    failures.add("gsm8k_0007", "500: new")
    assert failures.describe_last() == ("the last with: 500: new; most common of 7 failures (3): 503: 3 waiting")


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("no answer within 600 s (--request-timeout)", "--request-timeout"),
        ("429: too many requests", "--parallel"),
        ("503: 64 requests are waiting", "--parallel"),
        ("503: the model's replica was lost", "server's log"),
        ("400: the prompt has 9000 tokens, too long", "--max-tokens"),
        ("the connection was lost: [Errno 104]", "log"),
        ("the reply cannot be read: invalid JSON", "--base-url"),
        ("its task died 3 times: worker was killed", "memory"),
        ("500: 416 of 416 rows are not finite", "--dtype"),
        ("500: Internal Server Error", "log"),
        ("the scorer mine raised KeyError: 'nothing' (mine.py, line 11)", "roentgen score"),
    ],
)
def test_each_kind_that_a_run_meets_has_advice_of_its_own(message: str, words: str) -> None:
    assert words in advice(message)
    assert advice(message) != OTHERWISE
    assert advice("something new") == OTHERWISE
