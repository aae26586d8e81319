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
"""Number of samples of the rarest class below which a metric is unreliable."""

MARGIN = {"auroc": 0.05, "r2": 0.05}
"""Equivalence margin: two probes perform "about as well" if the whole interval of their difference lies within it."""

CONFOUNDERS = {
    "truncated": ("that were not truncated", "evaluate again with a larger --max-tokens"),
    "unread": ("with an extracted answer", "look at the other outputs, and score again with another --extractor"),
}
"""Per confounder: a phrase for the samples without it, and advice about the others."""

CHANCE = {"auroc": 0.5, "r2": 0.0}
"""The main metric of an uninformative probe."""


@dataclass(frozen=True)
class Estimate:
    """A metric with its 95% bootstrap interval over problems."""

    metric: str
    """Its name."""
    value: float
    """The estimate."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""

    def __str__(self) -> str:
        """Format as `0.71 [0.62, 0.79]`; an undefined value is a dash."""
        if not math.isfinite(self.value):
            return "–"
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            return f"{self.value:.2f} [–]"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def to_json(self) -> dict[str, float | None]:
        """Return `{"auroc": …, "low": …, "high": …}`; an undefined value is null."""
        values = {self.metric: self.value, "low": self.low, "high": self.high}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


def compared(difference: Estimate, margin: float) -> str:
    """Classify the paired difference of the probe from a baseline: "equal", "better", "worse" or "unclear"."""
    if -margin < difference.low and difference.high < margin:
        return "equal"
    return "better" if difference.low > 0 else "worse" if difference.high < 0 else "unclear"


def format_difference(difference: Estimate) -> str:
    """Format a difference with its interval, `+0.04 [-0.02, +0.10]`."""
    return f"{difference.value:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"


@dataclass(frozen=True)
class Candidate:
    """A candidate: a stored key, `layers.12.resid_post`, and the position where it is read."""

    key: str
    positions: str

    @property
    def name(self) -> str:
        """Name of the saved probe, `layers.12.resid_post@last_prompt`."""
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
    """The result of a candidate."""

    estimate: Estimate
    """The out-of-fold main metric, with the strength chosen on inner folds."""
    strength: float
    """Strength of the saved probe, which is fitted on all samples."""


@dataclass(frozen=True)
class Best:
    """The best candidate, chosen on inner folds and reported on outer ones."""

    estimate: Estimate
    """The main metric of the whole procedure, including the choice."""
    names: tuple[str, ...]
    """The candidate chosen in each outer fold."""
    metrics: dict[str, Estimate] = field(default_factory=dict)
    """All its metrics."""


@dataclass(frozen=True)
class Subset:
    """The best candidate on the samples without a confounder (truncation, or no extracted answer)."""

    left_out: int
    """Number of samples with the confounder."""
    estimate: Estimate | None
    """The main metric on the others; None if they have only one class."""
    only: str | None = None
    """The only class of the others; None if they have several."""


@dataclass(frozen=True)
class ProbeReport:
    """The results of one training."""

    sources: tuple[str, ...]
    """Names of the runs and sessions."""
    label: str
    """The label."""
    target: str
    """"binary", "real" or "classes"."""
    classes: tuple[str, ...]
    """Names of the classes, if they have names."""
    kind: str
    """The kind of probe."""
    positions: tuple[str, ...]
    """Positions that were read."""
    seed: int
    """Seed of folds, bootstrap and shuffles."""
    roentgen: str
    """Version of Roentgen."""
    data_hash: str
    """Hash of the samples and their labels."""
    n_samples: int
    """Number of samples."""
    n_problems: int
    """Number of problems: distinct questions, whatever their ids."""
    n_left_out: int
    """Number of samples without activations or without this label."""
    n_folds: int
    """Number of outer folds."""
    n_rarest: int
    """Number of samples of the rarest class; of all samples for a numeric label."""
    n_true: int | None
    """Number of samples whose label is True; None for other kinds of labels."""
    results: tuple[KeyResult, ...]
    """Results per candidate."""
    best: Best
    """The best candidate, chosen without the samples that it is evaluated on."""
    declared: Best | None
    """The candidate named beforehand; None if there is none."""
    baselines: dict[str, Estimate]
    """Baselines by name; see `baselines`."""
    against: dict[str, Estimate] = field(default_factory=dict)
    """Paired difference of the best candidate from each baseline, over the same draws of problems."""
    forecast: dict[str, Estimate] = field(default_factory=dict)
    """Metrics of a forecast without input, for those of `best` that need a threshold or a probability: accuracy of
    predicting the most frequent class; the other metrics of predicting the training share of True."""
    gains: dict[str, Estimate] = field(default_factory=dict)
    """Paired difference of the best candidate from that forecast; for Brier score and calibration error, lower is better."""
    kind_hash: str | None = None
    """Hash of the source of a custom probe kind."""
    without: dict[str, Subset] = field(default_factory=dict)
    """The best candidate on samples without a confounder, by confounder (`truncated`, `unread`), if some samples have it."""
    n_groups: int | None = None
    """Number of groups that folds keep together: problems, or templates shared by problems; None if it equals the number of
    problems."""
    session: str | None = None
    """The session that was read; None for the run's own activations."""
    within: bool = False
    """True if the main metric is computed within problems."""

    @property
    def metric(self) -> str:
        """The main metric's name."""
        return self.best.estimate.metric

    @property
    def chance(self) -> float:
        """The main metric of an uninformative probe."""
        return CHANCE[self.metric]

    @property
    def uncut(self) -> Estimate | None:
        """The best candidate's main metric on samples that were not truncated; None if all or none were."""
        return self.without["truncated"].estimate if "truncated" in self.without else None

    @property
    def prevalence(self) -> float | None:
        """The share of samples whose label is True; None for other kinds of labels."""
        return None if self.n_true is None else self.n_true / self.n_samples

    def notes(self) -> list[str]:
        """Return caveats about the numbers, one sentence each."""
        return list(self._notes())

    def _notes(self) -> Iterator[str]:
        if self.n_rarest < FEW:
            yield f"The rarest class has {self.n_rarest} samples (fewer than {FEW}): the intervals themselves are rough."
        if not self.best.estimate.low > self.chance:
            # Then it is no better than any baseline at chance level either, which is stated once.
            yield f"The best probe's interval reaches {self.chance:g}: this data does not show that it is better than chance."
            yield from self._beside_baselines(only_better=True)
        else:
            yield from self._beside_baselines()
            yield from self._beside_no_information()
        yield from self._without_confounders()
        if self.n_left_out:
            yield f"{self.n_left_out} samples were excluded because they have no activations or no such label."

    def _beside_baselines(self, *, only_better: bool = False) -> Iterator[str]:
        """List the baselines that perform as well; if the probe may be uninformative, only those that are informative."""
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
                    "the probe may be reading the same information."
                )
            elif verdict == "unclear" and self.best.estimate.low > self.chance:
                unclear.append(f"{called} ({found}; difference {format_difference(difference)})")
        if unclear:
            yield f"This data does not show whether the probe is better than {', '.join(unclear)}."

    def _beside_no_information(self) -> Iterator[str]:
        accuracy, brier = self.gains.get("accuracy"), self.gains.get("brier")
        if accuracy is not None and not accuracy.low > 0:
            own, plain = self.best.metrics["accuracy"], self.forecast["accuracy"]
            what = f"always predicting the most frequent class ({plain.value:.2f}; difference {format_difference(accuracy)})"
            if accuracy.value <= 0:
                yield f"Its accuracy, {own}, is no better than {what}: its binary predictions are useless."
            else:
                yield f"This data does not show whether its accuracy, {own}, is better than {what}."
        if brier is not None and not brier.high < 0:
            own, plain = self.best.metrics["brier"], self.forecast["brier"]
            what = f"that of always predicting the share of True ({plain.value:.2f}; difference {format_difference(brier)})"
            if brier.value >= 0:
                yield f"Its Brier score, {own}, is no better than {what}: its probabilities are useless."
            else:
                yield f"This data does not show whether its Brier score, {own}, is better than {what}."

    def _without_confounders(self) -> Iterator[str]:
        for name, subset in self.without.items():
            others, advice = CONFOUNDERS[name]
            if subset.only is not None:
                yield (
                    f"All samples {others} have {self.label} = {subset.only}: the label cannot be distinguished from what the "
                    f"other {subset.left_out} samples have in common; {advice}."
                )
            elif subset.estimate is not None and self.best.estimate.low > self.chance >= subset.estimate.low:
                yield f"On samples {others} it is {subset.estimate}: the other samples may carry the signal; {advice}."

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
