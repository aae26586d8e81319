"""Compares two runs on the same problems: the differences of their configurations and of their answers.

Only equal conditions are compared. If runs have variants, each variant is paired with the one that has the same prefix or,
if none has, the same name; a run without variants has an empty prefix. Variants without a counterpart are listed and
excluded from all numbers.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from roentgen.runs.config import differences
from roentgen.runs.questions import Posed, same_template
from roentgen.runs.run import Run
from roentgen.statistics import Accuracy, Difference, accuracy, difference

Verdicts = Mapping[Hashable, list[bool]]


@dataclass(frozen=True)
class Paired:
    """Two conditions compared on the problems that both have."""

    names: tuple[str | None, str | None]
    """Names of the two variants; None for a run without variants."""
    first: Accuracy
    """Accuracy under the first condition."""
    second: Accuracy
    """Accuracy under the second."""
    difference: Difference
    """Second minus first, paired by problem."""
    gained: list[str]
    """Problems that improve under the second condition."""
    lost: list[str]
    """Problems that it does worse."""


@dataclass(frozen=True)
class RunComparison:
    """Two runs, compared variant by variant."""

    configuration: list[tuple[str, Any, Any]]
    """Configuration differences: name, first value, second value."""
    first: Accuracy
    """Accuracy of the first run on the pairs of problem and variant that both runs have."""
    second: Accuracy
    """Accuracy under the second."""
    difference: Difference
    """Second minus first, paired likewise and clustered by problem."""
    gained: list[str]
    """Problems that improve in the second run; written `problem under variant` if there are several pairs."""
    lost: list[str]
    """Problems that it does worse."""
    pairs: tuple[Paired, ...]
    """The comparison of each pair of variants; a single pair for runs without variants."""
    alone: tuple[tuple[str | None, ...], tuple[str | None, ...]]
    """Variants of each run without a counterpart."""


def compare(first: Run, second: Run) -> RunComparison:
    """Compare two runs by their own primary extractors.

    Raises:
        RunError: if a record is damaged.
    """
    posed: dict[str, Posed] = {}
    before, after = (_verdicts(run, posed) for run in (first, second))
    groups = dict(zip(posed, same_template(list(posed.values())), strict=True))
    names = _counterparts(_prefixes(first), _prefixes(second))
    clusters: dict[Hashable, int] = {(pair, problem): groups[problem] for pair in names for problem in groups}
    every_before: dict[Hashable, list[bool]] = {}
    every_after: dict[Hashable, list[bool]] = {}
    pairs = []
    for pair in names:
        one: dict[Hashable, list[bool]] = {(pair, problem): v for problem, v in before.get(pair[0], {}).items()}
        two: dict[Hashable, list[bool]] = {(pair, problem): v for problem, v in after.get(pair[1], {}).items()}
        pairs.append(_pair(pair, one, two, clusters))
        every_before |= one
        every_after |= two
    whole = pairs[0] if len(pairs) == 1 else _pair((None, None), every_before, every_after, clusters, several=True)
    return RunComparison(
        list(differences(_described(first), _described(second))),
        whole.first, whole.second, whole.difference, whole.gained, whole.lost, tuple(pairs),
        (
            tuple(name for name in _prefixes(first) if name not in {one for one, _ in names}),
            tuple(name for name in _prefixes(second) if name not in {two for _, two in names}),
        ),
    )  # fmt: skip


def _pair(
    names: tuple[str | None, str | None],
    before: Verdicts,
    after: Verdicts,
    clusters: Mapping[Hashable, int],
    *,
    several: bool = False,
) -> Paired:
    """Compare the verdicts of two conditions, keyed by a pair of variants and a problem."""
    common = [key for key in before if key in after]
    changes = {key: _share(after[key]) - _share(before[key]) for key in common}

    def display_name(key: Any) -> str:
        (_, variant), problem = key
        return f"{problem} under {variant}" if several else str(problem)

    return Paired(
        names=names,
        first=_accuracy(before, common, clusters),
        second=_accuracy(after, common, clusters),
        difference=difference(after, before, clusters),
        gained=[display_name(key) for key, change in changes.items() if change > 0],
        lost=[display_name(key) for key, change in changes.items() if change < 0],
    )


def _prefixes(run: Run) -> dict[str | None, str]:
    """Return each variant's prefix; a run without variants has an empty one."""
    return {name: variant["prefix"] for name, variant in run.config.variants.items()} or {None: ""}


def _counterparts(
    first: Mapping[str | None, str], second: Mapping[str | None, str]
) -> list[tuple[str | None, str | None]]:
    """Pair variants: first those with equal name and prefix, then equal prefix, then equal name."""
    found: list[tuple[str | None, str | None]] = []
    rules: tuple[Callable[[str | None, str | None], bool], ...] = (
        lambda one, two: one == two and first[one] == second[two],
        lambda one, two: first[one] == second[two],
        lambda one, two: one == two,
    )
    for alike in rules:
        for one in first:
            two = next((n for n in second if alike(one, n) and n not in {b for _, b in found}), one)
            if two in second and alike(one, two) and not any(one == a or two == b for a, b in found):
                found.append((one, two))
    return sorted(found, key=lambda pair: list(first).index(pair[0]))


def _verdicts(run: Run, posed: dict[str, Posed]) -> dict[str | None, dict[str, list[bool]]]:
    """Return each problem's verdicts by variant, and add the problems to `posed`."""
    found: dict[str | None, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for sample in run.read_samples().by_name():
        if sample.error is None:
            posed.setdefault(sample.problem_id, sample.posed.brief())
            found[sample.variant][sample.problem_id].append(sample.correct)
    return dict(found)


def _share(verdicts: list[bool]) -> float:
    return sum(verdicts) / len(verdicts)


def _accuracy(verdicts: Verdicts, problems: list[Hashable], clusters: Mapping[Hashable, int]) -> Accuracy:
    pairs = [(verdict, clusters[problem]) for problem in problems for verdict in verdicts[problem]]
    return accuracy([verdict for verdict, _ in pairs], [cluster for _, cluster in pairs])


def _described(run: Run) -> dict[str, Any]:
    hashed = run.config.hashed
    prefixes = {name: variant["prefix"] for name, variant in run.config.variants.items()}
    extras = {"extractor": run.config.settings["extractor"], "versions": run.config.versions}
    return {**hashed, **extras} | ({"variants": prefixes} if prefixes else {})
