"""What one training found, and the schema of `results.json`.

`train` makes a `ProbeReport`, `plots` draws it, `console` prints it, and `to_json` spells it for the run's page.
Every number that a reader is shown is here, with the notes that should stop them from reading too much into it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

SCHEMA_VERSION = 2

FEW = 10
"""Samples of the rarest class below which a metric says little."""

CHANCE = {"auroc": 0.5, "r2": 0.0}
"""What the main metric of a probe that knows nothing is."""


@dataclass(frozen=True)
class Estimate:
    """A metric with its 95% interval (a bootstrap over problems).

    Attributes:
        metric: its name.
        value: the estimate.
        low: the interval's lower end.
        high: its upper end.
    """

    metric: str
    value: float
    low: float
    high: float

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


@dataclass(frozen=True)
class KeyResult:
    """The probe of one candidate: a stored key at a position.

    Attributes:
        key: the stored key, `layers.12.resid_post`.
        hook_point: the hook point.
        layer: the layer, None for a model-wide key.
        positions: where it was read.
        estimate: the main metric out of fold, the strength chosen on inner folds.
        strength: of the saved probe, which is fitted on all samples.
    """

    key: str
    hook_point: str
    layer: int | None
    positions: str
    estimate: Estimate
    strength: float

    @property
    def name(self) -> str:
        """What the saved probe is called, `layers.12.resid_post@last_prompt`."""
        return f"{self.key}@{self.positions}"


@dataclass(frozen=True)
class Best:
    """The best candidate, chosen on inner folds and reported on outer ones.

    Attributes:
        estimate: the main metric of the whole procedure, the choice included.
        names: the candidate chosen in each outer fold.
        metrics: every metric of it.
    """

    estimate: Estimate
    names: tuple[str, ...]
    metrics: dict[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True)
class ProbeReport:
    """What one training found.

    Attributes:
        sources: names of the runs and sessions.
        label: what was to be read.
        target: "binary", "real" or "classes".
        classes: names of the classes, where they have names.
        kind: the kind of probe.
        positions: where each rollout was read.
        seed: of folds, bootstrap and shuffles.
        roentgen: the version that found it.
        data_hash: of which samples with which labels.
        n_samples: samples used.
        n_problems: problems they are of.
        n_left_out: samples without activations or without this label.
        n_folds: outer folds.
        n_rarest: samples of the rarest class; all of them for a number.
        n_true: samples whose label is True, None where it is not a truth.
        results: per candidate.
        best: the best candidate, chosen without looking at the samples it is reported on.
        declared: every metric of the candidate that was named beforehand, None if none was.
        baselines: see `baselines`.
        uncut: the best candidate's main metric on samples that were not truncated, None where all or none were.
        session: the session it was read from, None for the run's own activations.
        within: whether the main metric is that within problems.
    """

    sources: tuple[str, ...]
    label: str
    target: str
    classes: tuple[str, ...]
    kind: str
    positions: tuple[str, ...]
    seed: int
    roentgen: str
    data_hash: str
    n_samples: int
    n_problems: int
    n_left_out: int
    n_folds: int
    n_rarest: int
    n_true: int | None
    results: tuple[KeyResult, ...]
    best: Best
    declared: Best | None
    baselines: dict[str, Estimate]
    uncut: Estimate | None = None
    session: str | None = None
    within: bool = False

    @property
    def metric(self) -> str:
        """The main metric's name."""
        return self.best.estimate.metric

    @property
    def chance(self) -> float:
        """The main metric of a probe that knows nothing."""
        return CHANCE[self.metric]

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
            yield f"The best probe's interval reaches {self.chance:g}: no better than chance as far as this data can tell."
        for name in (
            "prompt_length",
            "response_length",
            "mean_logprob",
            "question_words",
            "random_direction",
            "first_layer",
        ):
            found = self.baselines.get(name)
            if found is not None and found.value >= self.best.estimate.low and found.value > self.chance:
                yield (
                    f"{name.replace('_', ' ').capitalize()} alone does about as well ({found}): the probe may be reading that."
                )
        if self.uncut is not None and self.best.estimate.low > self.chance >= self.uncut.low:
            yield (
                f"Among samples that were not truncated it is {self.uncut}: truncated outputs may carry the signal; "
                "evaluate again with more --max-tokens."
            )
        if self.n_left_out:
            yield f"{self.n_left_out} samples have no activations or no such label and were left out."

    def to_json(self) -> dict[str, Any]:
        """Return the contents of `results.json`."""
        return {
            "schema": SCHEMA_VERSION,
            "roentgen": self.roentgen,
            "sources": list(self.sources),
            "kind": self.kind,
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
            "notes": self.notes(),
        }  # fmt: skip


def _best(best: Best) -> dict[str, Any]:
    metrics = {name: estimate.to_json() for name, estimate in best.metrics.items()}
    return {**best.estimate.to_json(), "keys": list(best.names), "metrics": metrics}
