"""Summarizes a run's samples: the numbers in `summary.json`.

Samples are read one at a time and only their verdicts are kept, so a summary of a hundred thousand problems takes tens of
megabytes. Samples with an error are counted as errors and excluded from all other numbers.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

from eval_jobs.exact_numbers import Quantity
from eval_jobs.extractors import EXTRACTORS
from eval_jobs.quantities import read_quantity
from roentgen.runs import VERDICTS, Posed, RunConfig, Sample, same_template
from roentgen.runs.failures import Failures
from roentgen.statistics import accuracy, difference, majority, mean, pass_at_k


def extractors_of(config: RunConfig) -> tuple[str, ...]:
    """Return the names of a run's built-in extractors and custom scorers."""
    return (*EXTRACTORS, *(name for name in config.scorers if name not in EXTRACTORS))


class _Row(NamedTuple):
    """What is kept of a sample: per extractor, its reading and whether it is correct (None if it did not judge the sample:
    it was added later, or reads only numbers)."""

    problem: str
    answers: tuple[str | None, ...]
    correct: tuple[bool | None, ...]


@dataclass
class _Group:
    """The samples of a variant or of a run."""

    names: tuple[str, ...]
    """The extractors."""
    clusters: dict[Hashable, int]
    """Maps a problem's id to its cluster of problems that count as one: the same question, or the same template. Filled
    after all samples have been read."""
    rows: list[_Row] = field(default_factory=list)
    truncated: int = 0
    out_of_turns: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    turns: int = 0
    tool_calls: int = 0

    def add(self, sample: Sample) -> None:
        answers = tuple(sample.answers.get(name) for name in self.names)
        correct = tuple(sample.correct_by.get(name) for name in self.names)
        self.rows.append(_Row(sample.problem_id, answers, correct))
        self.truncated += sample.finish_reason == "length"
        self.out_of_turns += sample.finish_reason == "max_turns"
        self.prompt_tokens += sample.prompt_tokens
        self.cached_tokens += sample.cached_tokens
        self.completion_tokens += sample.completion_tokens
        self.seconds += sample.seconds
        self.turns += len(sample.turns)
        self.tool_calls += sum(turn.tool_calls for turn in sample.turns)

    @property
    def judging(self) -> list[str]:
        """Extractors that have judged a sample; all of them if there is no sample."""
        judged = [any(row.correct[which] is not None for row in self.rows) for which in range(len(self.names))]
        return [name for name, has in zip(self.names, judged, strict=True) if has or not self.rows]

    def verdicts(self, extractor: str) -> dict[Hashable, list[bool]]:
        """Return each problem's verdicts, in the order of its samples."""
        which = self.names.index(extractor)
        found: dict[Hashable, list[bool]] = defaultdict(list)
        for row in self.rows:
            found[row.problem].append(bool(row.correct[which]))
        return found

    def accuracy(self, extractor: str) -> dict[str, Any]:
        which = self.names.index(extractor)
        judged = [(verdict, row.problem) for row in self.rows if (verdict := row.correct[which]) is not None]
        return asdict(accuracy([verdict for verdict, _ in judged], [self.clusters[problem] for _, problem in judged]))

    def unparsable(self, extractor: str) -> int:
        which = self.names.index(extractor)
        return sum(row.answers[which] is None for row in self.rows if row.correct[which] is not None)

    def count_verdicts(self, extractor: str) -> dict[str, int]:
        """Count an extractor's verdicts, by `VERDICTS`."""
        which = self.names.index(extractor)
        right = sum(bool(row.correct[which]) for row in self.rows)
        judged = sum(row.correct[which] is not None for row in self.rows)
        unread = self.unparsable(extractor)
        return dict(zip(VERDICTS, (right, judged - right - unread, unread), strict=True))

    def unread_but_right(self, extractor: str) -> int:
        """Count the samples for which an extractor found no answer and another found the gold answer."""
        which = self.names.index(extractor)
        return sum(row.answers[which] is None and any(row.correct) for row in self.rows)


@dataclass
class _StoredActivations:
    """The stored activations of the samples."""

    session_id: str | None = None
    uri: str | None = None
    rollouts: int = 0
    rows: int = 0
    keys: set[str] = field(default_factory=set)

    def add(self, sample: Sample) -> None:
        for rollout in sample.rollouts:
            self.session_id, self.uri = self.session_id or rollout.session_id, self.uri or rollout.uri
            self.rollouts += 1
            self.rows += rollout.row_stop - rollout.row_start
            self.keys.update(rollout.tensors)

    def summary(self) -> dict[str, Any] | None:
        if not self.rollouts:
            return None
        return {
            "session_id": self.session_id,
            "uri": self.uri,
            "rollouts": self.rollouts,
            "keys": sorted(self.keys),
            "mean_rows": self.rows / self.rollouts,
        }


def summarize_samples(config: RunConfig, samples: Iterable[Sample]) -> dict[str, Any]:
    """Summarize a run's samples."""
    clusters: dict[Hashable, int] = {}
    names = extractors_of(config)
    every, variants, stored = (
        _Group(names, clusters),
        {v: _Group(names, clusters) for v in config.variants},
        _StoredActivations(),
    )
    errors, failures, disagreements, posed = 0, Failures(), [], dict[str, Posed]()
    for sample in samples:
        if sample.error is not None:
            errors += 1
            failures.add(sample.sample_id, sample.error)
            continue
        every.add(sample)
        posed.setdefault(sample.problem_id, sample.posed.brief())
        stored.add(sample)
        if sample.variant is not None:
            variants[sample.variant].add(sample)
        if disagree(sample, config.settings["extractor"]):
            disagreements.append(sample.sample_id)
    clusters.update(zip(posed, same_template(list(posed.values())), strict=True))
    primary, scored = config.settings["extractor"], len(every.rows)
    return {
        "complete": scored == expected_samples(config),
        "run_id": config.run_id,
        "config_hash": config.config_hash,
        "model": config.hashed["model"],
        "problems": config.problems,
        "mode": config.hashed.get("mode", "no-tools"),
        "extractor": primary,
        "samples": scored,
        "scored_problems": len({row.problem for row in every.rows}),
        "expected_samples": expected_samples(config),
        "errors": errors,
        "failures": [failure.to_json() for failure in failures.commonest_first()],
        "truncated": every.truncated,
        "out_of_turns": every.out_of_turns,
        "unparsable": every.unparsable(primary),
        "unread_but_right": every.unread_but_right(primary),
        "verdicts": every.count_verdicts(primary),
        "accuracy": every.accuracy(primary),
        "several_samples": _several(every, primary) if config.problems.get("epochs", 1) > 1 and not variants else None,
        "extractors": {name: _extractor(every, name, primary) for name in every.judging},
        "agreement": _agreement(every),
        "disagreements": disagreements,
        "variants": _variants(variants, primary, config.problems.get("epochs", 1)),
        "prompt_tokens": every.prompt_tokens,
        "cached_tokens": every.cached_tokens,
        "completion_tokens": every.completion_tokens,
        "request_seconds": every.seconds,
        "turns": every.turns,
        "tool_calls": every.tool_calls,
        "activations": stored.summary(),
    }


def expected_samples(config: RunConfig) -> int:
    """Return the number of samples of a complete run."""
    return int(config.problems["samples"]) * int(config.problems.get("epochs", 1)) * max(1, len(config.variants))


def disagree(sample: Sample, primary: str) -> bool:
    """True if extractors that found an answer disagree, or the primary one found none and another found the gold answer."""
    verdicts = {sample.correct_by[name] for name, answer in sample.answers.items() if answer is not None}
    return len(verdicts) > 1 or (True in verdicts and sample.answers.get(primary) is None)


def _extractor(group: _Group, name: str, primary: str) -> dict[str, Any]:
    this, that = group.names.index(name), group.names.index(primary)
    return {
        **group.accuracy(name),
        "unparsable": group.unparsable(name),
        "verdicts": group.count_verdicts(name),
        "differs_from_primary": sum(
            row.correct[this] != row.correct[that] for row in group.rows if row.correct[this] is not None
        ),
    }


def _agreement(group: _Group) -> list[dict[str, Any]]:
    """Return the agreement of each pair of extractors: how many outputs they judge alike, and the direction of the
    differences."""
    places = [group.names.index(name) for name in group.judging]
    return [
        {
            "extractors": [group.names[one], group.names[other]],
            "same": sum(row.correct[one] == row.correct[other] for row in both),
            "only_first": sum(bool(row.correct[one]) and not row.correct[other] for row in both),
            "only_second": sum(bool(row.correct[other]) and not row.correct[one] for row in both),
        }
        for one, other in combinations(places, 2)
        for both in [[row for row in group.rows if None not in (row.correct[one], row.correct[other])]]
    ]


def _several(group: _Group, extractor: str) -> dict[str, Any]:
    """Return pass@k and maj@k over the problems with at least k samples; maj@k uses the first k of each."""
    which = group.names.index(extractor)
    by_problem: dict[str, list[tuple[str | None, bool]]] = defaultdict(list)
    for row in group.rows:
        by_problem[row.problem].append((_number(row.answers[which]), bool(row.correct[which])))
    most = max(map(len, by_problem.values()), default=0)
    found: dict[str, Any] = {"pass_at_k": {}, "maj_at_k": {}}
    for k in _ks(most):
        problems = [problem for problem, samples in by_problem.items() if len(samples) >= k]
        enough, belongs = (
            [by_problem[problem] for problem in problems],
            [group.clusters[problem] for problem in problems],
        )
        chances = [pass_at_k(len(samples), sum(correct for _, correct in samples), k) for samples in enough]
        passed = mean(chances, belongs, trials=sum(len(samples) // k for samples in enough))
        agreed = mean([float(_majority_is_right(samples[:k])) for samples in enough], belongs)
        found["pass_at_k"][str(k)] = {**asdict(passed), "problems": len(enough)} if passed else None
        found["maj_at_k"][str(k)] = {**asdict(agreed), "problems": len(enough)} if agreed else None
    return found


def _ks(most: int) -> list[int]:
    """Return 1, 2, 4, … and `most` itself."""
    return sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | ({most} if most else set()))


def _majority_is_right(samples: Sequence[tuple[str | None, bool]]) -> bool:
    winner = majority(answer for answer, _ in samples)
    return winner is not None and next(correct for answer, correct in samples if answer == winner)


def _number(answer: str | None) -> str | None:
    """Normalize equal numbers, so that 18 and 18.00 are votes for the same answer."""
    found = None if answer is None else read_quantity(answer)
    return found.values[0] if isinstance(found, Quantity) else answer


def _variants(groups: dict[str, _Group], primary: str, epochs: int) -> dict[str, Any]:
    """Return each variant's numbers and its difference from the first variant on the same problems."""
    found: dict[str, Any] = {}
    reference: dict[Hashable, list[bool]] | None = None
    for name, group in groups.items():
        verdicts = group.verdicts(primary)
        found[name] = {
            "samples": len(group.rows),
            "accuracy": group.accuracy(primary),
            "several_samples": _several(group, primary) if epochs > 1 else None,
            "extractors": {extractor: group.accuracy(extractor) for extractor in group.judging},
            "truncated": group.truncated,
            "unparsable": group.unparsable(primary),
            "verdicts": group.count_verdicts(primary),
            "completion_tokens": group.completion_tokens,
            "against_first": None if reference is None else asdict(difference(verdicts, reference, group.clusters)),
        }
        reference = verdicts if reference is None else reference
    return found
