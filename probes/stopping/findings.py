"""From what each setting would have done to what it is worth: accuracy against tokens, with intervals over problems.

A setting that is chosen and reported on the same problems flatters: of a hundred the best was lucky too. So the problems are
dealt into two halves. On one each family of settings (the probe, fixed lengths, equal readings) is set to what needs the fewest
tokens and loses no more accuracy than is allowed; on the other all of them are reported. A random direction is not set by
itself. It is given the probe's setting, the score that as many of its own are below and as many tokens in a row: it stops about
as readily without knowing anything. The probe itself may have been trained on these very problems, which the report says.
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
"""Problems of a half below which its numbers say little."""


@dataclass(frozen=True)
class StopFinding:
    """What a setting would have done."""

    setting: Setting
    """The setting."""
    accuracy: Estimate
    """The share of right answers."""
    change: Estimate
    """The accuracy's difference from that of whole answers, on the same problems."""
    tokens: Estimate
    """The mean number of tokens."""
    saved: Estimate
    """The share of all tokens that were not generated."""
    stopped: float
    """The share of answers that were stopped."""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        numbers = {name: getattr(self, name).to_json() for name in ("accuracy", "change", "tokens", "saved")}
        return {**asdict(self.setting), **numbers, "stopped": self.stopped}


@dataclass(frozen=True)
class Chosen:
    """The setting of one family that was chosen on the one half, and what it did on the other; of a random direction, the
    probe's."""

    kind: RuleKind
    """The family's kind."""
    number: int
    """Which of the random directions."""
    finding: StopFinding | None
    """None if no setting kept the accuracy; of a random direction, if none of the probe's did."""


@dataclass(frozen=True)
class LiveFinding:
    """What the chosen setting did on a server, on the same half."""

    accuracy: Estimate
    """The share of right answers."""
    tokens: Estimate
    """The mean number of tokens."""
    stopped: float
    """The share of answers that were stopped."""
    same_length: float
    """The share of answers that have as many tokens as the stored rows say."""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        numbers = {"accuracy": self.accuracy.to_json(), "tokens": self.tokens.to_json()}
        return {**numbers, "stopped": self.stopped, "same_length": self.same_length}


@dataclass(frozen=True)
class StopReport:
    """A sweep and what it found: the contents of `stopping.json`."""

    run: str
    """The run's folder."""
    probe: str
    """The probe's path."""
    key: str
    """What it reads."""
    where: str
    """Which tokens count."""
    then: str
    """What is done where it stops."""
    max_loss: float
    """The accuracy that a setting may lose on the half that it is chosen on."""
    seen: bool
    """Whether the probe was trained on the run's problems."""
    samples: tuple[int, int]
    """How many rollouts settings were chosen on, and how many they are reported on."""
    problems: tuple[int, int]
    """Of how many problems."""
    seed: int
    """Of the halves, the random directions and the bootstrap."""
    whole: StopFinding
    """Whole answers, on the reported half."""
    chosen: tuple[Chosen, ...]
    """Per family: the probe, random directions, fixed lengths, equal readings."""
    findings: tuple[StopFinding, ...]
    """Every setting, on the reported half."""
    live: LiveFinding | None = None
    """What the probe's chosen setting did on a server, if that was asked for."""
    folder: str = field(default="", compare=False)
    """Where the report is."""

    @property
    def probes_own(self) -> StopFinding | None:
        """What the probe's chosen setting did; None if no setting kept the accuracy."""
        return next(one.finding for one in self.chosen if one.kind == "probe")

    @property
    def stop_when(self) -> dict[str, Any] | None:
        """The chosen setting as a request's `stop_when`."""
        if (found := self.probes_own) is None:
            return None
        fields = {"above": found.setting.above, "for": found.setting.length, "where": self.where, "then": self.then}
        return StopWhen.model_validate(fields).model_dump()

    def notes(self) -> list[str]:
        """Return what should stop a reader from reading too much into the numbers."""
        notes = []
        if min(self.problems) < FEW:
            notes.append(
                f"There are {self.problems[0]} and {self.problems[1]} problems in the halves: that says little."
            )
        if self.seen:
            notes.append("The probe was trained on problems of this run, so its scores here flatter it.")
        if self.probes_own is None:
            notes.append(f"No setting of the probe loses at most {self.max_loss:g} of the accuracy.")
        elif self.probes_own.saved.low <= 0:
            notes.append("The probe saves no tokens that the interval could tell from none.")
        if self.then == "close_reasoning":
            notes.append(
                "What the model says after its reasoning is closed is not in the stored rows: the answer is what is read in "
                "the reasoning, and its tokens are those of the model's own. --confirm measures it."
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
    """Deal problems into halves; return which rollouts are of the half that settings are chosen on."""
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
    """Choose each family's setting on one half, and find what all of them do on the other.

    Args:
        traces: the rollouts.
        settings: what was tried, "whole" first.
        stops: what each did to each, `[settings][traces]`.
        choosing: which are of the half that settings are chosen on.
        max_loss: the accuracy that a setting may lose there.
        seed: of the bootstrap.

    Returns:
        Whole answers, the chosen settings, and every setting, on the other half.
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
    """Return what a setting did on a server.

    Args:
        correct: whether each answer is right.
        tokens: how many each has.
        stopped: whether the probe has acted.
        expected: how many tokens the stored rows say.
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
    """Estimate how an accuracy differs from that of whole answers, problem by problem."""
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
    """Return the chosen settings as a table: what, setting, accuracy, its change, tokens, and the share saved."""
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
