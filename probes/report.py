"""What one training found, and the schema of `results.json`.

`train` makes a `ProbeReport`, `plots` draws it, `console` prints it, and `to_json` spells it for the run's page.
Every number that a reader is shown is here, with the notes that should stop them from reading too much into it.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

SCHEMA_VERSION = 1

FEW = 10
"""Samples of the rarer class below which an AUROC says little."""


@dataclass(frozen=True)
class Estimate:
    """An AUROC with its 95% interval (a bootstrap over problems).

    Attributes:
        auroc: the estimate.
        low: the interval's lower end.
        high: its upper end.
    """

    auroc: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.auroc:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class KeyResult:
    """The probe of one stored key.

    Attributes:
        key: the stored key, `layers.12.resid_post`; it names the probe's tensors in `probes.safetensors`.
        hook_point: the hook point.
        layer: the layer, None for a model-wide key.
        estimate: out-of-fold AUROC, the strength chosen on inner folds.
        C: the strength of the saved probe, which is fitted on all samples.
    """

    key: str
    hook_point: str
    layer: int | None
    estimate: Estimate
    C: float


@dataclass(frozen=True)
class Best:
    """The best key, chosen on inner folds and reported on outer ones.

    Attributes:
        estimate: AUROC of the whole procedure, the choice included.
        keys: the key chosen in each outer fold.
    """

    estimate: Estimate
    keys: tuple[str, ...]


@dataclass(frozen=True)
class ProbeReport:
    """What one training found.

    Attributes:
        run_id: the run.
        label: what was to be read.
        positions: from which row of each rollout.
        seed: of folds, bootstrap and shuffles.
        roentgen: the version that found it.
        n_samples: samples used.
        n_problems: problems they are of.
        n_left_out: samples of the run without activations.
        n_folds: outer folds.
        n_true: samples whose label is True.
        keys: per stored key.
        best: the best key, chosen without looking at the samples it is reported on.
        baselines: what needs no activations: `prompt_length`, `response_length`; and `shuffled_labels`, the whole
            search on labels dealt at random.
        session: the session it was read from, None for the run's own activations.
    """

    run_id: str
    label: str
    positions: str
    seed: int
    roentgen: str
    n_samples: int
    n_problems: int
    n_left_out: int
    n_folds: int
    n_true: int
    keys: tuple[KeyResult, ...]
    best: Best
    baselines: dict[str, Estimate]
    session: str | None = None

    @property
    def prevalence(self) -> float:
        """The share of samples whose label is True."""
        return self.n_true / self.n_samples

    def notes(self) -> list[str]:
        """Return what a reader should know before believing the numbers, one sentence each."""
        return list(self._notes())

    def _notes(self) -> Iterator[str]:
        rarer = min(self.n_true, self.n_samples - self.n_true)
        if rarer < FEW:
            yield f"The rarer class has {rarer} samples (fewer than {FEW}): the intervals themselves are rough."
        if self.best.estimate.low <= 0.5:
            yield "The best probe's interval reaches 0.5: no better than chance as far as this run can tell."
        for name in ("prompt_length", "response_length"):
            if self.baselines[name].auroc >= self.best.estimate.low:
                yield (
                    f"{name.replace('_', ' ').capitalize()} alone does about as well ({self.baselines[name]}): "
                    "the probe may be reading that."
                )
        if self.n_left_out:
            yield f"{self.n_left_out} samples of the run have no activations and were left out."

    def to_json(self) -> dict[str, Any]:
        """Return the contents of `results.json`."""
        return {
            "schema": SCHEMA_VERSION,
            "roentgen": self.roentgen,
            "run_id": self.run_id,
            "kind": "logistic",
            "label": self.label,
            "session": self.session,
            "positions": self.positions,
            "seed": self.seed,
            "n_samples": self.n_samples,
            "n_problems": self.n_problems,
            "n_left_out": self.n_left_out,
            "n_folds": self.n_folds,
            "n_true": self.n_true,
            "prevalence": self.prevalence,
            "keys": [
                {"key": r.key, "hook_point": r.hook_point, "layer": r.layer, **asdict(r.estimate), "C": r.C}
                for r in self.keys
            ],
            "best": {**asdict(self.best.estimate), "keys": list(self.best.keys)},
            "baselines": {name: asdict(estimate) for name, estimate in self.baselines.items()},
            "notes": self.notes(),
        }
