"""Evaluates the settings of a stopping sweep: accuracy against tokens, with intervals over problems.

A setting chosen and evaluated on the same problems looks too good, because the best of a hundred was also lucky. So the
problems are split into two halves. On one, each family of settings (the probe, fixed lengths, equal readings) is set to the
one that needs the fewest tokens without losing more accuracy than allowed; on the other, all settings are evaluated. A
random direction is not tuned separately: it gets the probe's setting, with the threshold that the same share of its own
scores is below, so that it stops about as often while being uninformative. The probe may have been trained on these very
problems, which the report states.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from probes.bootstrap import bootstrap_weights, estimate
from probes.report import Estimate, format_difference
from probes.stopping.stop_settings import RuleKind, Setting
from probes.stopping.sweep import Stop
from probes.stopping.traces import StopTrace
from roentgen.statistics import accuracy, difference
from roentgen.stop_rule import StopWhen

FEW = 20
"""Number of problems per half below which its results are unreliable."""


@dataclass(frozen=True)
class StopFinding:
    """The effect of a setting."""

    setting: Setting
    """The setting."""
    accuracy: Estimate
    """Accuracy."""
    change: Estimate
    """Difference of the accuracy from that of complete answers, on the same problems."""
    tokens: Estimate
    """Mean number of tokens."""
    saved: Estimate
    """Share of all tokens that were not generated."""
    stopped: float
    """Share of answers that were stopped."""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        numbers = {name: getattr(self, name).to_json() for name in ("accuracy", "change", "tokens", "saved")}
        return {**asdict(self.setting), **numbers, "stopped": self.stopped}


@dataclass(frozen=True)
class Chosen:
    """The setting of one family chosen on one half, and its effect on the other; for a random direction, the probe's."""

    kind: RuleKind
    """The family's kind."""
    number: int
    """Number of the random direction."""
    finding: StopFinding | None
    """None if no setting kept the accuracy; for a random direction, if none of the probe's did."""


@dataclass(frozen=True)
class LiveFinding:
    """The effect of the chosen setting on a server, on the same half."""

    accuracy: Estimate
    """Accuracy."""
    tokens: Estimate
    """Mean number of tokens."""
    stopped: float
    """Share of answers that were stopped."""
    same_length: float
    """Share of answers with as many tokens as the stored rows predict."""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        numbers = {"accuracy": self.accuracy.to_json(), "tokens": self.tokens.to_json()}
        return {**numbers, "stopped": self.stopped, "same_length": self.same_length}


@dataclass(frozen=True)
class StopReport:
    """A sweep and its results: the contents of `stopping.json`."""

    run: str
    """The run's folder."""
    probe: str
    """The probe's path."""
    key: str
    """The stored key that the probe reads."""
    where: str
    """The tokens that count."""
    then: str
    """The effect of stopping."""
    max_loss: float
    """Accuracy that a setting may lose on the half that it is chosen on."""
    seen: bool
    """True if the probe was trained on the run's problems."""
    samples: tuple[int, int]
    """Number of rollouts for choosing and for evaluation."""
    problems: tuple[int, int]
    """Number of problems, likewise."""
    seed: int
    """Seed of the halves, the random directions and the bootstrap."""
    whole: StopFinding
    """Complete answers, on the evaluation half."""
    chosen: tuple[Chosen, ...]
    """Per family: the probe, random directions, fixed lengths, equal readings."""
    findings: tuple[StopFinding, ...]
    """Every setting, on the evaluation half."""
    live: LiveFinding | None = None
    """The probe's chosen setting on a server, if requested."""
    folder: str = field(default="", compare=False)
    """The report's folder."""

    @property
    def probes_own(self) -> StopFinding | None:
        """The effect of the probe's chosen setting; None if no setting kept the accuracy."""
        return next(one.finding for one in self.chosen if one.kind == "probe")

    @property
    def stop_when(self) -> dict[str, Any] | None:
        """The chosen setting as a request's `stop_when`."""
        if (found := self.probes_own) is None:
            return None
        fields = {"above": found.setting.above, "for": found.setting.length, "where": self.where, "then": self.then}
        return StopWhen.model_validate(fields).model_dump()

    def notes(self) -> list[str]:
        """Return caveats about the numbers."""
        notes = []
        if min(self.problems) < FEW:
            notes.append(
                f"The halves have only {self.problems[0]} and {self.problems[1]} problems: the results are unreliable."
            )
        if self.seen:
            notes.append("The probe was trained on problems of this run, so its results here are too good.")
        if self.probes_own is None:
            notes.append(f"No setting of the probe loses at most {self.max_loss:g} of the accuracy.")
        elif self.probes_own.saved.low <= 0:
            notes.append("The tokens that the probe saves are not distinguishable from none.")
        if self.then == "close_reasoning":
            notes.append(
                "The stored rows do not contain the answer after a closed reasoning: the answer is extracted from the "
                "reasoning, with the token count of the model's own answer. --confirm measures it."
            )
        return notes

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        evaluation = {
            name: getattr(self, name)
            for name in (
                "run",
                "probe",
                "key",
                "where",
                "then",
                "max_loss",
                "seen",
                "samples",
                "problems",
                "seed",
                "stop_when",
            )
        }
        return {
            **evaluation,
            "notes": self.notes(),
            "whole": self.whole.to_json(),
            "chosen": [
                {"kind": one.kind, "number": one.number, "finding": one.finding and one.finding.to_json()}
                for one in self.chosen
            ],
            "live": self.live and self.live.to_json(),
            "findings": [finding.to_json() for finding in self.findings],
        }


def split_halves(groups: Sequence[int], seed: int) -> Bool[np.ndarray, "traces"]:
    """Split problems into halves; return which rollouts are in the half for choosing."""
    numbers = np.unique(groups)
    first = np.random.default_rng(seed).permutation(numbers)[: len(numbers) // 2]
    return np.isin(groups, first)


def summarize_stops(
    traces: Sequence[StopTrace],
    settings: Sequence[Setting],
    stops: Sequence[Sequence[Stop]],
    choosing: Bool[np.ndarray, "traces"],
    max_loss: float,
    seed: int = 0,
) -> tuple[StopFinding, tuple[Chosen, ...], tuple[StopFinding, ...]]:
    """Choose each family's setting on one half, and evaluate all of them on the other.

    Args:
        traces: the rollouts.
        settings: the settings, "whole" first.
        stops: the effect of each setting on each rollout, `[settings][traces]`.
        choosing: which rollouts are in the half for choosing.
        max_loss: accuracy that a setting may lose there.
        seed: of the bootstrap.

    Returns:
        Complete answers, the chosen settings, and every setting, on the other half.
    """
    correct = np.array([[stop.correct for stop in row] for row in stops])
    tokens = np.array([[stop.tokens for stop in row] for row in stops])
    own = np.array([trace.group for trace in traces])[~choosing]
    _, groups = np.unique(own, return_inverse=True)
    weights = bootstrap_weights(groups, seed)

    def found(number: int) -> StopFinding:
        at = np.flatnonzero(~choosing)
        stopped = float(np.mean([stops[number][place].place is not None for place in at.tolist()]))
        mine, whole = tokens[number][at].astype(float), tokens[0][at].astype(float)
        return StopFinding(
            settings[number],
            share(correct[number][at], groups),
            _change(correct[number][at], correct[0][at], groups),
            estimate("tokens", lambda w: w @ mine / w.sum(1), weights, widening=1),
            estimate("saved", lambda w: 1 - w @ mine / (w @ whole), weights, widening=1),
            stopped,
        )

    findings = tuple(found(number) for number in range(len(settings)))
    families: dict[tuple[RuleKind, int], list[int]] = {}
    for number, setting in enumerate(settings[1:], start=1):
        families.setdefault(setting.family, []).append(number)
    least = correct[0][choosing].mean() - max_loss
    chosen, place = [], None
    for (kind, which), members in families.items():
        if kind == "random":
            best = None if place is None else members[place]
        else:
            kept = [number for number in members if correct[number][choosing].mean() >= least]
            best = min(kept, key=lambda number: tokens[number][choosing].mean(), default=None)
        if kind == "probe":
            place = None if best is None else members.index(best)
        chosen.append(Chosen(kind, which, None if best is None else findings[best]))
    return findings[0], tuple(chosen), findings


def live_finding(
    correct: Bool[np.ndarray, "answers"],
    tokens: Int[np.ndarray, "answers"],
    stopped: Bool[np.ndarray, "answers"],
    expected: Int[np.ndarray, "answers"],
    groups: Sequence[int],
    seed: int = 0,
) -> LiveFinding:
    """Evaluate a setting on a server.

    Args:
        correct: whether each answer is correct.
        tokens: token count of each answer.
        stopped: whether the probe stopped each answer.
        expected: token count of each answer predicted by the stored rows.
        groups: the answers' problems.
        seed: of the bootstrap.
    """
    _, numbers = np.unique(groups, return_inverse=True)
    weights, mine = bootstrap_weights(numbers, seed), tokens.astype(float)
    return LiveFinding(
        share(correct, numbers),
        estimate("tokens", lambda w: w @ mine / w.sum(1), weights, widening=1),
        float(stopped.mean()),
        float((tokens == expected).mean()),
    )


def share(correct: Bool[np.ndarray, "answers"], groups: Int[np.ndarray, "answers"]) -> Estimate:
    """Estimate an accuracy, clustered by problem."""
    own = accuracy(correct.tolist(), groups.tolist())
    assert own.value is not None
    assert own.low is not None
    assert own.high is not None
    return Estimate("accuracy", own.value, own.low, own.high)


def _change(
    here: Bool[np.ndarray, "answers"], whole: Bool[np.ndarray, "answers"], groups: Int[np.ndarray, "answers"]
) -> Estimate:
    """Estimate the difference of an accuracy from that of complete answers, paired by problem."""
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    own = difference(
        {number: here[at].tolist() for number, at in enumerate(members)},
        {number: whole[at].tolist() for number, at in enumerate(members)},
    )
    assert own.value is not None
    assert own.low is not None
    assert own.high is not None
    return Estimate("difference", own.value, own.low, own.high)


def rows(report: StopReport) -> list[tuple[str, str, str, str, str, str]]:
    """Return the chosen settings as a table: name, setting, accuracy, its change, tokens, and the share saved."""
    names = {"probe": "the probe", "fixed_length": "a fixed length", "convergence": "answer convergence"}
    table = [("whole answers", "", str(report.whole.accuracy), "", _tokens(report.whole.tokens), "")]
    for one in report.chosen:
        name = names.get(one.kind, f"random direction {one.number + 1}")
        if one.finding is None:
            table.append((name, "none keeps the accuracy", "", "", "", ""))
            continue
        found = one.finding
        table.append(
            (
                name, str(found.setting), str(found.accuracy), format_difference(found.change), _tokens(found.tokens),
                str(found.saved),
            )
        )  # fmt: skip
    if report.live is not None:
        table.append(("the probe, live", "", str(report.live.accuracy), "", _tokens(report.live.tokens), ""))
    return table


def _tokens(found: Estimate) -> str:
    return f"{found.value:.0f} [{found.low:.0f}, {found.high:.0f}]"
