"""Two runs on the same problems: what differs in their configurations, and in their answers."""

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from eval_jobs.resume import differences
from eval_jobs.statistics import Accuracy, Difference, accuracy, difference
from roentgen.runs import Run


@dataclass(frozen=True)
class Comparison:
    """What two runs say of the problems that both have.

    Attributes:
        configuration: what differs: name, value in the first, value in the second.
        first: the first run's accuracy on them.
        second: the second's.
        difference: the second minus the first, paired by problem.
        gained: problems that the second does better.
        lost: problems that it does worse.
    """

    configuration: list[tuple[str, Any, Any]]
    first: Accuracy
    second: Accuracy
    difference: Difference
    gained: list[str]
    lost: list[str]


def compare(first: Run, second: Run) -> Comparison:
    """Compare two runs, each by its own primary extractor.

    Raises:
        RunError: if a record is damaged.
    """
    before, after = _verdicts(first), _verdicts(second)
    common = [problem for problem in before if problem in after]
    changes = {problem: _share(after[problem]) - _share(before[problem]) for problem in common}
    return Comparison(
        configuration=list(differences(_described(first), _described(second))),
        first=_accuracy(before, common),
        second=_accuracy(after, common),
        difference=difference(after, before),
        gained=[str(problem) for problem, change in changes.items() if change > 0],
        lost=[str(problem) for problem, change in changes.items() if change < 0],
    )


def _verdicts(run: Run) -> dict[Hashable, list[bool]]:
    found: dict[Hashable, list[bool]] = defaultdict(list)
    for sample in run.samples().by_name():
        if sample.error is None:
            found[sample.problem_id].append(sample.correct)
    return dict(found)


def _share(verdicts: list[bool]) -> float:
    return sum(verdicts) / len(verdicts)


def _accuracy(verdicts: dict[Hashable, list[bool]], problems: list[Hashable]) -> Accuracy:
    pairs = [(verdict, problem) for problem in problems for verdict in verdicts[problem]]
    return accuracy([verdict for verdict, _ in pairs], [problem for _, problem in pairs])


def _described(run: Run) -> dict[str, Any]:
    return {**run.config.hashed, "extractor": run.config.settings["extractor"], "versions": run.config.versions}
