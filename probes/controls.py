"""Controls for the best probe: baselines on the same folds, a forecast without input, and samples without a confounder.

Comparisons are paired. The probe and its baseline score the same samples, so their difference is bootstrapped with the same
draws of problems and shared difficulty cancels. "About as well" is a claim of its own (the whole interval of the difference
lies within a margin), not the absence of a significant difference, which a small sample always shows.
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
"""Possible confounders by name; each function returns which samples have it."""

Scores = Float[np.ndarray, "rows outputs"]


@dataclass(frozen=True)
class Controls:
    """A dataset with the bootstrap draws of its metrics."""

    data: ProbeDataset
    """The dataset."""
    draws: Int[np.ndarray, "draws rows"]
    """Weight of each row in each draw."""
    within: bool
    """True if scores compare only within problems."""

    def main(self, scores: Scores, target: Target | None = None) -> Estimate:
        """Return the main metric."""
        return main_estimate(scores, target or self.data.target, self.data.problems, self.draws, within=self.within)

    def every(self, scores: Scores, raw: Scores) -> dict[str, Estimate]:
        """Return all metrics by name."""
        return all_estimates(scores, raw, self.data.target, self.data.problems, self.draws, within=self.within)

    def against(self, best: Scores, other: Scores) -> Estimate:
        """Return the paired difference of the best probe's main metric from another's."""
        one, two = (
            main_measure(scores, self.data.target, self.data.problems, within=self.within)[1]
            for scores in (best, other)
        )
        return self._difference(one, two)

    def forecast(self, raw: Scores, unread: Scores) -> tuple[dict[str, Estimate], dict[str, Estimate]]:
        """Return the metrics of a forecast without input, and the probe's paired difference from them.

        Args:
            raw: log-odds or logits of the probe.
            unread: log-odds or logits of a forecast that predicts the training share of each class.
        """
        target = self.data.target
        if self.within or target.kind == "real":
            return {}, {}
        own, plain = (forecast_measures(scores, target) for scores in (raw, unread))
        # In balanced data the training shares of a fold point the wrong way: predict the more frequent class instead.
        if target.kind == "binary":
            plain["accuracy"] = forecast_measures(np.full_like(raw, 2 * target.values.mean() - 1), target)["accuracy"]
        return (
            {name: estimate(name, measure, self.draws) for name, measure in plain.items()},
            {name: self._difference(own[name], plain[name]) for name in plain},
        )

    def _difference(self, one: Measure, two: Measure) -> Estimate:
        return estimate("difference", lambda weights: one(weights) - two(weights), self.draws, WIDENING)


def without(data: ProbeDataset, scores: Scores, *, within: bool, seed: int) -> dict[str, Subset]:
    """Evaluate the best candidate on the samples without each confounder, if some samples have it and some do not."""
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
    """Return the only class left, or the classes left if there are several."""
    names = target.classes or ("False", "True")
    return ", ".join(names[int(value)] for value in np.unique(target.values))
