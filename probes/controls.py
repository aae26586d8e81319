"""What the best probe's numbers are held against: simpler readers on the same folds, a forecast that reads nothing, and samples
that a confounder has been taken from.

Comparisons are paired. The probe and what it is held against score the same samples, so their difference is bootstrapped with
the same draws of problems: what is hard for both cancels. "About as well" is a claim of its own (the whole interval of the
difference lies within a margin), not the absence of a difference, which few samples always give.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from probes.baselines import truncated, unread
from probes.bootstrap import WIDENING, bootstrap_weights, estimate
from probes.dataset import ProbeDataset
from probes.evaluation import Measure, all_estimates, forecast_measures, main_estimate, main_measure
from probes.labels import Target
from probes.report import Estimate, Subset

CONFOUNDERS: dict[str, Callable[[ProbeDataset], Bool[np.ndarray, "samples"]]] = {
    "truncated": truncated,
    "unread": unread,
}
"""What may carry the signal instead of what is meant, by name; each says which samples have it."""

Scores = Float[np.ndarray, "rows outputs"]


@dataclass(frozen=True)
class Controls:
    """The rows of some data, and how metrics of scores of them are drawn."""

    data: ProbeDataset
    """The data."""
    draws: Int[np.ndarray, "draws rows"]
    """How often each row counts in each draw."""
    within: bool
    """Whether scores compare within problems only."""

    def main(self, scores: Scores, target: Target | None = None) -> Estimate:
        """Return the main metric of scores."""
        return main_estimate(scores, target or self.data.target, self.data.problems, self.draws, within=self.within)

    def every(self, scores: Scores, raw: Scores) -> dict[str, Estimate]:
        """Return every metric of scores, by name."""
        return all_estimates(scores, raw, self.data.target, self.data.problems, self.draws, within=self.within)

    def against(self, best: Scores, other: Scores) -> Estimate:
        """Return how much better the best probe's main metric is than another's, paired."""
        one, two = (
            main_measure(scores, self.data.target, self.data.problems, within=self.within)[1]
            for scores in (best, other)
        )
        return self._difference(one, two)

    def forecast(self, raw: Scores, unread: Scores) -> tuple[dict[str, Estimate], dict[str, Estimate]]:
        """Return the metrics that a forecast without any input has, and how much higher the probe's are, paired.

        Args:
            raw: log-odds or logits of the probe.
            unread: of a forecast that says the training share of each class.
        """
        target = self.data.target
        if self.within or target.kind == "real":
            return {}, {}
        own, plain = (forecast_measures(scores, target) for scores in (raw, unread))
        if (
            target.kind == "binary"
        ):  # in balanced data the training shares point the wrong way: take what is more frequent
            plain["accuracy"] = forecast_measures(np.full_like(raw, 2 * target.values.mean() - 1), target)["accuracy"]
        return (
            {name: estimate(name, measure, self.draws) for name, measure in plain.items()},
            {name: self._difference(own[name], plain[name]) for name in plain},
        )

    def _difference(self, one: Measure, two: Measure) -> Estimate:
        return estimate("difference", lambda weights: one(weights) - two(weights), self.draws, WIDENING)


def without(data: ProbeDataset, scores: Scores, *, within: bool, seed: int) -> dict[str, Subset]:
    """Estimate the best candidate on the samples that do not have each confounder, where some have it and some do not."""
    found = {}
    for name, has in CONFOUNDERS.items():
        kept = ~has(data)
        if data.target.name == name or kept.all() or not kept.any():
            continue
        values = data.target.values[kept]
        target = Target(data.target.name, data.target.kind, values, data.target.classes)
        few = len(np.unique(values)) < max(2, len(target.classes))
        groups, problems = (np.unique(part[kept], return_inverse=True)[1] for part in (data.groups, data.problems))
        own = (
            None
            if few
            else main_estimate(scores[kept], target, problems, bootstrap_weights(groups, seed), within=within)
        )
        found[name] = Subset(int((~kept).sum()), own, None if own or target.kind == "real" else _only(target))
    return found


def _only(target: Target) -> str:
    """Return what all samples have, of a target with one class left; of several classes, those that are left."""
    names = target.classes or ("False", "True")
    return ", ".join(names[int(value)] for value in np.unique(target.values))
