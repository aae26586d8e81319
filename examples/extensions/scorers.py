r"""Scorers of one's own: functions of an output and its problem.

roentgen eval --problems examples/extensions/capitals.py:capitals --samples 12 --output results/capitals \
    --extractor examples/extensions/scorers.py:mentions
roentgen score results/capitals --extractor examples/extensions/scorers.py:first_word     # the same answers, judged again
"""

from roentgen import Output, Problem, Verdict


def mentions(output: Output, problem: Problem) -> bool:
    """Say whether the answer is mentioned: True and False are enough."""
    return problem.gold.casefold() in output.casefold()


def first_word(output: Output, problem: Problem) -> Verdict:
    """Read the first word. An output without one has no answer, which is counted apart from a wrong one."""
    words = [word.strip(".,!*\"'") for word in output.split()]
    answer = next((word for word in words if word), None)
    correct = answer is not None and answer.casefold() == problem.gold.casefold()
    # Values are labels of the sample: `roentgen probe train RUN --label words`.
    return Verdict(correct, answer, values={"words": len(words), "cut": output.finish_reason == "length"})
