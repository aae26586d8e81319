"""Summarizes a steering sweep: accuracy, parse rate and length per direction and scale, with intervals.

The unit is the problem. Several directions of one kind are first averaged within each problem, so intervals are over
problems, whatever the number of directions. Shares have Wilson's interval and differences of shares have Tango's
(`roentgen.intervals`), with one trial per problem; both have positive width even if all problems agree. Lengths and their
differences have a bootstrap over problems. Differences are paired: each problem is compared with itself without steering.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from probes.bootstrap import bootstrap_weights
from probes.report import Estimate
from probes.steering.arms import Along
from probes.steering.sweep import SweepOutcome
from roentgen.intervals import paired, wilson

MEASURES: dict[str, Callable[[SweepOutcome], float]] = {
    "accuracy": lambda outcome: float(outcome.correct),
    "parse_rate": lambda outcome: float(outcome.parsed),
    "length": lambda outcome: float(outcome.tokens),
}
COLORS_BY_DIRECTION = {"probe": "C0", "random": "C1", "orthogonal": "C2"}


@dataclass(frozen=True)
class SteeringFinding:
    """The effect of steering along one kind of direction at one scale."""

    along: Along
    """The kind."""
    scale: float
    """The scale."""
    directions: int
    """Number of directions of the kind."""
    values: dict[str, Estimate]
    """Mean over problems, per measure."""
    differences: dict[str, Estimate]
    """Mean difference from no steering, per measure; empty for no steering."""


@dataclass(frozen=True)
class SweepReport:
    """A sweep and its results: the contents of `steering.json`."""

    probe: str
    """The probe's path."""
    model: str
    """The served model."""
    revision: str
    """Its revision."""
    label: str
    """What the probe reads."""
    key: str
    """The hook point where vectors were added."""
    positions: str
    """The steered positions."""
    unit: float
    """Length of the vector added at scale 1."""
    problems: int
    """Number of problems, each answered in every arm."""
    seen: bool
    """True if the probe was trained on these problems."""
    seed: int
    """Seed of the control directions."""
    sampling: dict[str, Any]
    """Parameters of every request."""
    findings: tuple[SteeringFinding, ...]
    """No steering first, then by direction and scale."""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        spelled = asdict(self)
        spelled["findings"] = [
            {
                "along": finding.along,
                "scale": finding.scale,
                "directions": finding.directions,
                **{name: value.to_json() for name, value in finding.values.items()},
                "differences": {name: value.to_json() for name, value in finding.differences.items()},
            }
            for finding in self.findings
        ]
        return spelled

    def draw(self) -> Figure:
        """Plot each measure over the scale, one line per kind of direction with its 95% interval."""
        figure = Figure(figsize=(10, 3.6), dpi=150, layout="constrained")
        plain = next(finding for finding in self.findings if finding.along == "nothing")
        for axes, measure in zip(figure.subplots(1, len(MEASURES)), MEASURES, strict=True):
            for along, color in COLORS_BY_DIRECTION.items():
                own = sorted((f for f in self.findings if f.along == along), key=lambda f: f.scale)
                if not own:
                    continue
                estimates = [finding.values[measure] for finding in own]
                scales = [finding.scale for finding in own]
                axes.plot(scales, [e.value for e in estimates], marker="o", markersize=3, color=color, label=along)
                low, high = [e.low for e in estimates], [e.high for e in estimates]
                axes.fill_between(scales, low, high, alpha=0.12, linewidth=0, color=color)
            axes.axhline(plain.values[measure].value, color="0.4", linewidth=1, linestyle="--", label="no steering")
            axes.set_title(measure.replace("_", " "), loc="left", fontsize="medium")
            axes.set_xlabel(f"scale, in units of {self.unit:.3g}")
            axes.set_ylabel("tokens" if measure == "length" else f"share of {self.problems} problems")
            axes.spines[["top", "right"]].set_visible(False)
            if measure != "length":
                axes.set_ylim(-0.03, 1.03)
        figure.legend(
            *figure.axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize="small"
        )
        return figure


def summarize_sweep(outcomes: Sequence[SweepOutcome], seed: int = 0) -> tuple[SteeringFinding, ...]:
    """Summarize outcomes; every problem must have been answered in every arm.

    Args:
        outcomes: the answers.
        seed: seed of the bootstrap.
    """
    problems = sorted({outcome.problem_id for outcome in outcomes})
    arms: dict[tuple[Along, float], list[SweepOutcome]] = defaultdict(list)
    for outcome in outcomes:
        arms[outcome.along, outcome.scale].append(outcome)
    plain = {name: _per_problem(arms["nothing", 0.0], problems, measure) for name, measure in MEASURES.items()}
    weights = bootstrap_weights(np.arange(len(problems)), seed)
    order = ("nothing", "probe", "random", "orthogonal")
    findings = []
    for (along, scale), own in sorted(arms.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
        means = {name: _per_problem(own, problems, measure) for name, measure in MEASURES.items()}
        values = {
            name: _mean(name, values, weights) if name == "length" else _share(name, values)
            for name, values in means.items()
        }
        differences = {
            name: _mean(name, values - plain[name], weights)
            if name == "length"
            else _change(name, values - plain[name])
            for name, values in means.items()
        }
        findings.append(
            SteeringFinding(
                along,
                scale,
                len({outcome.number for outcome in own}),
                values,
                {} if along == "nothing" else differences,
            )
        )
    return tuple(findings)


def _per_problem(
    outcomes: Sequence[SweepOutcome], problems: Sequence[str], measure: Callable[[SweepOutcome], float]
) -> Float[np.ndarray, "problems"]:
    found: dict[str, list[float]] = defaultdict(list)
    for outcome in outcomes:
        found[outcome.problem_id].append(measure(outcome))
    return np.array([np.mean(found[problem]) for problem in problems])


def _share(name: str, values: Float[np.ndarray, "problems"]) -> Estimate:
    """Estimate a share with Wilson's interval (1927), with one trial per problem."""
    p = float(values.mean())
    return Estimate(name, p, *wilson(p, len(values)))


def _change(name: str, changes: Float[np.ndarray, "problems"]) -> Estimate:
    """Estimate a difference of shares with Tango's interval."""
    more, less = float(changes.clip(min=0).mean()), float((-changes).clip(min=0).mean())
    return Estimate(name, more - less, *paired(more, less, len(changes)))


def _mean(name: str, values: Float[np.ndarray, "problems"], weights: np.ndarray) -> Estimate:
    low, high = np.percentile(weights @ values / len(values), [2.5, 97.5])
    return Estimate(name, float(values.mean()), float(low), float(high))
