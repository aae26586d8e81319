"""The results of one training, and the schema of `results.json`.

`train` creates a `ProbeReport`, `plots` draws it, `terminal_report` prints it, and `to_json` serializes it for the run's
page. It holds every number that a reader is shown, with notes that guard against over-interpretation.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from roentgen.contract import split_key

SCHEMA_VERSION = 2

FEW = 10
"""Samples of the rarest class below which a metric says little."""

MARGIN = {"auroc": 0.05, "r2": 0.05}
"""How far apart two probes may be and do "about as well": the interval of their difference has to lie within it."""

CONFOUNDERS = {
    "truncated": ("that were not truncated", "evaluate again with more --max-tokens"),
    "unread": ("whose answer could be read", "see what the others wrote, and score again with another --extractor"),
}
"""What the samples without a confounder are, and what can be done about the others."""

CHANCE = {"auroc": 0.5, "r2": 0.0}
"""What the main metric of a probe that knows nothing is."""


@dataclass(frozen=True)
class Estimate:
    """A metric with its 95% interval (a bootstrap over problems)."""

    metric: str
    """Its name."""
    value: float
    """The estimate."""
    low: float
    """The interval's lower end."""
    high: float
    """Its upper end."""

    def __str__(self) -> str:
        """Spell it as `0.71 [0.62, 0.79]`; what is not defined is a dash, not a number."""
        if not math.isfinite(self.value):
            return "–"
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            return f"{self.value:.2f} [–]"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def to_json(self) -> dict[str, float | None]:
        """Return it as `{"auroc": …, "low": …, "high": …}`; what is not defined is null."""
        values = {self.metric: self.value, "low": self.low, "high": self.high}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


def compared(difference: Estimate, margin: float) -> str:
    """Return what the paired difference of the probe from a baseline says: "equal", "better", "worse" or "unclear"."""
    if -margin < difference.low and difference.high < margin:
        return "equal"
    return "better" if difference.low > 0 else "worse" if difference.high < 0 else "unclear"


def format_difference(difference: Estimate) -> str:
    """Spell a difference with its interval, `+0.04 [-0.02, +0.10]`."""
    return f"{difference.value:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"


@dataclass(frozen=True)
class Candidate:
    """A stored key, `layers.12.resid_post`, and the position where it is read."""

    key: str
    positions: str

    @property
    def name(self) -> str:
        """What the saved probe is called, `layers.12.resid_post@last_prompt`."""
        return f"{self.key}@{self.positions}"

    @property
    def hook_point(self) -> str:
        """The hook point."""
        return split_key(self.key)[0]

    @property
    def layer(self) -> int | None:
        """The layer, None for a model-wide key."""
        return split_key(self.key)[1]


@dataclass(frozen=True)
class KeyResult(Candidate):
    """What a candidate gives."""

    estimate: Estimate
    """The main metric out of fold, the strength chosen on inner folds."""
    strength: float
    """Of the saved probe, which is fitted on all samples."""


@dataclass(frozen=True)
class Best:
    """The best candidate, chosen on inner folds and reported on outer ones."""

    estimate: Estimate
    """The main metric of the whole procedure, the choice included."""
    names: tuple[str, ...]
    """The candidate chosen in each outer fold."""
    metrics: dict[str, Estimate] = field(default_factory=dict)
    """Every metric of it."""


@dataclass(frozen=True)
class Subset:
    """The best candidate on the samples without a confounder (being cut, having no answer that could be read)."""

    left_out: int
    """How many samples have it."""
    estimate: Estimate | None
    """The main metric on the others; None where they have one class only."""
    only: str | None = None
    """The class that all the others have, None where there are several."""


@dataclass(frozen=True)
class ProbeReport:
    """What one training found."""

    sources: tuple[str, ...]
    """Names of the runs and sessions."""
    label: str
    """What was to be read."""
    target: str
    """"binary", "real" or "classes"."""
    classes: tuple[str, ...]
    """Names of the classes, where they have names."""
    kind: str
    """The kind of probe."""
    positions: tuple[str, ...]
    """Where each rollout was read."""
    seed: int
    """Of folds, bootstrap and shuffles."""
    roentgen: str
    """The version that found it."""
    data_hash: str
    """Of which samples with which labels."""
    n_samples: int
    """Samples used."""
    n_problems: int
    """Problems they are of: questions, whatever their ids."""
    n_left_out: int
    """Samples without activations or without this label."""
    n_folds: int
    """Outer folds."""
    n_rarest: int
    """Samples of the rarest class; all of them for a number."""
    n_true: int | None
    """Samples whose label is True, None where it is not a truth."""
    results: tuple[KeyResult, ...]
    """Per candidate."""
    best: Best
    """The best candidate, chosen without looking at the samples it is reported on."""
    declared: Best | None
    """Every metric of the candidate that was named beforehand, None if none was."""
    baselines: dict[str, Estimate]
    """See `baselines`."""
    against: dict[str, Estimate] = field(default_factory=dict)
    """How much better the best candidate is than a baseline, by name, paired: over the same draws of problems."""
    forecast: dict[str, Estimate] = field(default_factory=dict)
    """What a forecast that reads nothing gets by the metrics of `best` that need a threshold or a probability: the accuracy
    of the most frequent class; the other metrics of the training share of True."""
    gains: dict[str, Estimate] = field(default_factory=dict)
    """How much higher the best candidate's are, paired; of Brier score and calibration error, lower is better."""
    kind_hash: str | None = None
    """Hash of the source of a kind of probe that is not built in."""
    without: dict[str, Subset] = field(default_factory=dict)
    """The best candidate on samples without a confounder, by its name, where some have it: `truncated`, `unread`."""
    n_groups: int | None = None
    """Groups that folds keep together: problems, or templates that problems share; None: as many as problems."""
    session: str | None = None
    """The session it was read from, None for the run's own activations."""
    within: bool = False
    """Whether the main metric is that within problems."""

    @property
    def metric(self) -> str:
        """The main metric's name."""
        return self.best.estimate.metric

    @property
    def chance(self) -> float:
        """The main metric of a probe that knows nothing."""
        return CHANCE[self.metric]

    @property
    def uncut(self) -> Estimate | None:
        """The best candidate's main metric on samples that were not truncated, None where all or none were."""
        return self.without["truncated"].estimate if "truncated" in self.without else None

    @property
    def prevalence(self) -> float | None:
        """The share of samples whose label is True, None where it is not a truth."""
        return None if self.n_true is None else self.n_true / self.n_samples

    def notes(self) -> list[str]:
        """Return what a reader should know before believing the numbers, one sentence each."""
        return list(self._notes())

    def _notes(self) -> Iterator[str]:
        if self.n_rarest < FEW:
            yield f"The rarest class has {self.n_rarest} samples (fewer than {FEW}): the intervals themselves are rough."
        if not self.best.estimate.low > self.chance:
            # And so no better than what else is no better than chance: that is said once.
            yield f"The best probe's interval reaches {self.chance:g}: no better than chance as far as this data can tell."
            yield from self._beside_baselines(only_better=True)
        else:
            yield from self._beside_baselines()
            yield from self._beside_no_information()
        yield from self._without_confounders()
        if self.n_left_out:
            yield f"{self.n_left_out} samples have no activations or no such label and were left out."

    def _beside_baselines(self, *, only_better: bool = False) -> Iterator[str]:
        """Say which baselines do as well; where the probe may know nothing, only those that do know something."""
        unclear = []
        for name, difference in self.against.items():
            found, called = self.baselines[name], name.replace("_", " ")
            if not (found.low if only_better else found.value) > self.chance:
                continue
            verdict = compared(difference, MARGIN[self.metric])
            if verdict in ("equal", "worse"):
                how = f"about as well{'' if verdict == 'equal' else ' or better'}"
                yield (
                    f"{called.capitalize()} alone does {how} ({found}; difference {format_difference(difference)}): "
                    "the probe may be reading that."
                )
            elif verdict == "unclear" and self.best.estimate.low > self.chance:
                unclear.append(f"{called} ({found}; difference {format_difference(difference)})")
        if unclear:
            yield f"This data cannot tell whether the probe does better than {', '.join(unclear)}."

    def _beside_no_information(self) -> Iterator[str]:
        accuracy, brier = self.gains.get("accuracy"), self.gains.get("brier")
        if accuracy is not None and not accuracy.low > 0:
            own, plain = self.best.metrics["accuracy"], self.forecast["accuracy"]
            what = f"giving the most frequent answer every time ({plain.value:.2f}; difference {format_difference(accuracy)})"
            if accuracy.value <= 0:
                yield f"Its accuracy, {own}, is no better than {what}: its yes or no is of no use, whatever its rank order."
            else:
                yield f"This data cannot tell whether its accuracy, {own}, is better than {what}."
        if brier is not None and not brier.high < 0:
            own, plain = self.best.metrics["brier"], self.forecast["brier"]
            what = f"that of saying the share of True every time ({plain.value:.2f}; difference {format_difference(brier)})"
            if brier.value >= 0:
                yield f"Its Brier score, {own}, is no better than {what}: its probabilities are of no use."
            else:
                yield f"This data cannot tell whether its Brier score, {own}, is better than {what}."

    def _without_confounders(self) -> Iterator[str]:
        for name, subset in self.without.items():
            others, advice = CONFOUNDERS[name]
            if subset.only is not None:
                yield (
                    f"All samples {others} have {self.label} = {subset.only}: the label cannot be told apart from what the "
                    f"{subset.left_out} others have in common; {advice}."
                )
            elif subset.estimate is not None and self.best.estimate.low > self.chance >= subset.estimate.low:
                yield f"Among samples {others} it is {subset.estimate}: the others may carry the signal; {advice}."

    def to_json(self) -> dict[str, Any]:
        """Return the contents of `results.json`."""
        return {
            "schema": SCHEMA_VERSION,
            "roentgen": self.roentgen,
            "sources": list(self.sources),
            "kind": self.kind,
            **({} if self.kind_hash is None else {"kind_hash": self.kind_hash}),
            "label": self.label,
            "target": self.target,
            "classes": list(self.classes),
            "session": self.session,
            "positions": ", ".join(self.positions),
            "metric": "within_auroc" if self.within else self.metric,
            "seed": self.seed,
            "data_hash": self.data_hash,
            "n_samples": self.n_samples,
            "n_problems": self.n_problems,
            "n_left_out": self.n_left_out,
            "n_groups": self.n_problems if self.n_groups is None else self.n_groups,
            "n_folds": self.n_folds,
            "n_true": self.n_true,
            "prevalence": self.prevalence,
            "keys": [
                {
                    "key": r.key, "hook_point": r.hook_point, "layer": r.layer, "positions": r.positions,
                    **r.estimate.to_json(), "strength": r.strength,
                }
                for r in self.results
            ],
            "best": _best(self.best),
            "declared": None if self.declared is None else _best(self.declared),
            "baselines": {name: estimate.to_json() for name, estimate in self.baselines.items()},
            "uncut": None if self.uncut is None else self.uncut.to_json(),
            "against": {
                name: {**difference.to_json(), "verdict": compared(difference, MARGIN[self.metric])}
                for name, difference in self.against.items()
            },
            "forecast": {name: estimate.to_json() for name, estimate in self.forecast.items()},
            "gains": {name: gain.to_json() for name, gain in self.gains.items()},
            "without": {
                name: {
                    "left_out": subset.left_out, "only": subset.only,
                    **({} if subset.estimate is None else subset.estimate.to_json()),
                }
                for name, subset in self.without.items()
            },
            "notes": self.notes(),
        }  # fmt: skip


def _best(best: Best) -> dict[str, Any]:
    metrics = {name: estimate.to_json() for name, estimate in best.metrics.items()}
    return {**best.estimate.to_json(), "keys": list(best.names), "metrics": metrics}
