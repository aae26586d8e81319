"""Custom scorers: allowed results, and the messages for others."""

import asyncio
import sys
from typing import Any

import numpy as np
import pytest

from eval_jobs.extractors import EXTRACTORS, UnknownScorerError, choose_scorer, judge, score
from eval_jobs.problems import Problem
from eval_jobs.verdicts import Output, ScorerError, ScoringFailedError, Verdict, run_scorer

PROBLEM = Problem("capital-1", 1, "The capital of France?", "Paris", "Paris", fields={"continent": "Europe"})
OUTPUT = Output("It is Paris.", ({"role": "user", "content": "?"},), "stop")


async def ask(returned: Any) -> Verdict:
    return await run_scorer("mine", lambda output, problem: returned, OUTPUT, PROBLEM)


async def test_a_verdict_or_a_truth_value_sync_or_async() -> None:
    async def asking(output: Output, problem: Problem) -> Verdict:
        return Verdict(problem.gold in output, problem.gold, {"messages": len(output.messages)})

    assert await run_scorer("asking", asking, OUTPUT, PROBLEM) == Verdict(True, "Paris", {"messages": 1})
    assert await ask(True) == await ask(np.bool_(True)) == Verdict(True, "It is Paris.")
    assert await ask(False) == Verdict(False, "It is Paris.")
    assert await ask(Verdict(False)) == Verdict(False, None)  # no answer was found
    assert await ask(Verdict(True)) == Verdict(True, "It is Paris.")  # what is right has an answer


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("yes", r"the scorer mine returned 'yes' \(str\) for capital-1; allowed are a Verdict, True and False"),
        (None, r"returned None \(NoneType\) for capital-1"),
        (1, r"returned 1 \(int\)"),
        ((True, "Paris"), r"returned \(True, 'Paris'\) \(tuple\)"),
        (Verdict("yes"), r"returned a Verdict for capital-1 with correct='yes' \(str\); allowed are True and False"),
        (Verdict(True, 18), r"with answer=18 \(int\); allowed are a text and None"),
        (Verdict(True, "a", {"score": [1]}), r"with values=.*a label is a text, a number.*and this is a list"),
        (Verdict(True, "a", {"score": float("nan")}), "only finite numbers"),
    ],
)
async def test_a_wrong_one_is_told_what_it_returned(returned: Any, said: str) -> None:
    with pytest.raises(ScorerError, match=said):
        await ask(returned)


async def test_an_exception_is_told_with_its_line() -> None:
    def failing(output: Output, problem: Problem) -> bool:
        return problem.fields["missing"] == output

    line = failing.__code__.co_firstlineno + 1
    with pytest.raises(
        ScoringFailedError, match=rf"the scorer mine raised KeyError: 'missing' \(test_verdicts\.py, line {line}\)"
    ):
        await run_scorer("mine", failing, OUTPUT, PROBLEM)


async def test_one_that_takes_too_long_or_ends_the_process_fails_this_output_alone() -> None:
    async def hanging(output: Output, problem: Problem) -> bool:
        await asyncio.sleep(60)
        return True

    async def cancelling(output: Output, problem: Problem) -> bool:
        raise asyncio.CancelledError

    def leaving(output: Output, problem: Problem) -> bool:
        sys.exit("no")

    async def timed_out(output: Output, problem: Problem) -> bool:
        raise TimeoutError("of its own")

    for scorer, limit, said in [
        (hanging, 0.01, r"gave no verdict within 0\.01 s \(--request-timeout\)"),
        (cancelling, 5, "raised CancelledError"),
        (leaving, 5, "raised SystemExit: no"),
        (timed_out, 5, "raised TimeoutError: of its own"),
    ]:
        with pytest.raises(ScoringFailedError, match=rf"the scorer mine {said}"):
            await run_scorer("mine", scorer, OUTPUT, PROBLEM, limit)
    rollout = asyncio.ensure_future(run_scorer("mine", hanging, OUTPUT, PROBLEM))
    await asyncio.sleep(0.01)
    rollout.cancel()
    with pytest.raises(asyncio.CancelledError):
        await rollout


async def test_a_user_s_scorer_judges_beside_the_extractors_that_suit_the_problem() -> None:
    scores = await judge(OUTPUT, PROBLEM, {"mine": lambda output, problem: Verdict(True, "Paris", {"grade": 9})})
    assert scores.answers == {"answer": "It is Paris.", "mine": "Paris"}
    assert scores.correct_by == {"answer": False, "mine": True}
    assert scores.values == {"grade": 9}
    number = Problem("sum-1", 1, "1 + 1?", "#### 2", "2")
    assert (await judge(Output("Answer: 2"), number)).correct_by.keys() == EXTRACTORS.keys()
    assert score("Answer: Paris", "Paris").correct_by == {"answer": True}
    chosen = await judge(Output("Answer: Paris"), PROBLEM, {"boxed": EXTRACTORS["boxed"]})
    assert chosen.correct_by == {"answer": True, "boxed": False}  # asked for, though it reads numbers


def test_a_scorer_is_a_function_with_a_name_of_its_own() -> None:
    def answer(output: Output, problem: Problem) -> bool:
        return True

    with pytest.raises(UnknownScorerError, match="'answer' is the name of a built-in extractor; rename the function"):
        choose_scorer(answer)
    with pytest.raises(
        UnknownScorerError, match=r"eval_jobs\.extractors:DEFAULT_EXTRACTOR is str; a scorer is a function"
    ):
        choose_scorer("eval_jobs.extractors:DEFAULT_EXTRACTOR")
    assert choose_scorer("flexible").value is EXTRACTORS["flexible"]
