"""Nested cross-validation: an unbiased estimate of how well a probe predicts a label.

Method:
    1. Outer folds split *problems*, stratified by label (`folds`).
    2. Inside the training part of each outer fold, inner folds of the same kind score every candidate (a key at a position)
       and every strength.
    3. Every choice (a candidate's strength; the best candidate) is made on inner folds and evaluated on the outer test part,
       which took no part in the choice. A maximum over layers chosen and reported on the same folds is biased upwards.
       Strengths are chosen by log-loss, because the AUROC does not change when a penalty shrinks scores; candidates are
       chosen by the main metric. The inner scores then calibrate the outer ones to log-odds (`calibration`).
    4. The test scores of all outer folds together give the metrics; drawing problems with replacement gives their intervals
       (`bootstrap`).
    5. Baselines go through the same steps (`baselines`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from probes import metrics
from probes.bootstrap import WIDENING, estimate
from probes.calibration import Calibration, log_loss
from probes.cross_validation import Case, Tested, cross_validate, whole
from probes.folds import Fold, mixed
from probes.kinds import Kind
from probes.labels import Target
from probes.report import Estimate
from roentgen.intervals import auroc, exact


@dataclass(frozen=True)
class Evaluation:
    """Nested scores of several candidates on the same rows."""

    scores: Float[np.ndarray, "candidates rows outputs"]
    """Scores of each row by a probe neither fitted nor chosen on its problem, comparable across folds, `[candidates, rows,
    outputs]`."""
    raw: Float[np.ndarray, "candidates rows outputs"]
    """The same scores in meaningful units: log-odds, values or logits."""
    inner: Float[np.ndarray, "folds candidates"]
    """Main metric on the inner folds at the strength chosen there, `[folds, candidates]`."""
    strength: Float[np.ndarray, "candidates"]
    """Strength for a refit on all rows: the best over the outer folds, `[candidates]`."""
    slope: Float[np.ndarray, "fits candidates"]
    """Calibration slope of probes of that strength: first for a refit on all rows, then for the fit of each outer fold, `[1
    + folds, candidates]`."""
    intercept: Float[np.ndarray, "fits candidates"]
    """Calibration intercept, likewise."""

    def calibration(self, candidate: int) -> tuple[Calibration, ...]:
        """Return a candidate's calibrations: for a refit on all rows, then for the fit of each outer fold."""
        return tuple(
            Calibration(*(part[fit, [candidate]] for part in (self.slope, self.intercept)))
            for fit in range(len(self.slope))
        )

    @classmethod
    def concatenate(cls, parts: Sequence["Evaluation"]) -> "Evaluation":
        """Join evaluations of different candidates on the same folds."""
        return cls(
            np.concatenate([part.scores for part in parts]),
            np.concatenate([part.raw for part in parts]),
            np.concatenate([part.inner for part in parts], axis=1),
            np.concatenate([part.strength for part in parts]),
            np.concatenate([part.slope for part in parts], axis=1),
            np.concatenate([part.intercept for part in parts], axis=1),
        )


def evaluate(
    X: Float[Tensor, "candidates rows ..."],
    targets: Sequence[Target],
    groups: Int[np.ndarray, "rows"],
    folds: Sequence[Fold],
    kind: Kind,
) -> list[Evaluation]:
    """Evaluate one probe per target and candidate, with strengths chosen on inner folds and scores taken on outer ones.

    Targets are labels of the same rows: the requested label, and shuffled ones.
    """
    outer = [[Case(target, fold.train, fold.test) for fold in folds] for target in targets]
    # With one candidate and one strength there is nothing to choose on inner folds, and numeric values need no calibration.
    chooses = len(X) * len(kind.strengths) > 1 or kind.probabilistic
    inner = [[_inner_cases(target, fold, groups, kind) if chooses else [] for fold in folds] for target in targets]
    tested: list[list[list[Tested]]] = [[[] for _ in folds] for _ in targets]
    for place in range(len(folds)):
        cases = [[outer[t][place], *inner[t][place]] for t in range(len(targets))]
        found = iter(cross_validate(X, [case for part in cases for case in part], groups, kind))
        for t, part in enumerate(cases):
            tested[t][place] = list(islice(found, len(part)))
    return [_evaluation(X, outer[t], inner[t], tested[t], groups, kind) for t in range(len(targets))]


def _inner_cases(target: Target, fold: Fold, groups: Int[np.ndarray, "rows"], kind: Kind) -> list[Case]:
    """Return the inner folds of an outer one, except those in which shuffled labels leave a class without training samples."""
    cases = [Case(target, fold.train[train], fold.train[test]) for train, test in fold.inner]
    if target.kind == "real":
        return cases
    if kind.within:
        return [case for case in cases if mixed(target.values[case.train], groups[case.train]).any()]
    classes = len(np.unique(target.values))
    return [case for case in cases if len(np.unique(target.values[case.train])) == classes]


def _evaluation(
    X: Float[Tensor, "candidates rows ..."],
    outer: Sequence[Case],
    inner: Sequence[Sequence[Case]],
    tested: Sequence[Sequence[Tested]],
    groups: Int[np.ndarray, "rows"],
    kind: Kind,
) -> Evaluation:
    """Choose each candidate's strength on the inner folds of each outer one, and take its scores on the outer test part."""
    target, number, everything = outer[0].target, np.arange(len(X)), np.arange(len(groups))
    at_each, raw_at_each = whole(outer, [found[0] for found in tested], len(groups))
    best = choose_strength(at_each, raw_at_each, target, groups, everything, kind)
    calibrations = [_calibrate(raw_at_each[number, best], target, everything, kind)]
    scores, raw = at_each[:, 0].copy(), raw_at_each[:, 0].copy()
    chosen_by = np.zeros((len(outer), len(X)))
    for place, case in enumerate(outer):
        # Without inner folds, use the first strength and candidate, and leave the scores uncalibrated.
        chosen, calibration, of_best = np.zeros(len(X), dtype=int), Calibration.none(len(X)), Calibration.none(len(X))
        if inner[place]:
            rows = np.concatenate([one.test for one in inner[place]])
            inside, raw_inside = (part[:, :, rows] for part in whole(inner[place], tested[place][1:], len(groups)))
            chosen = choose_strength(inside, raw_inside, target, groups, rows, kind)
            chosen_by[place] = main_metric_each(inside[number, chosen][:, None], target, groups, rows, kind)[:, 0]
            calibration = _calibrate(raw_inside[number, chosen], target, rows, kind)
            of_best = _calibrate(raw_inside[number, best], target, rows, kind)
        calibrations.append(of_best)
        scores[:, case.test] = at_each[number, chosen][:, case.test]
        raw[:, case.test] = calibration(raw_at_each[number, chosen][:, case.test])
    slope, intercept = np.stack([c.slope for c in calibrations]), np.stack([c.intercept for c in calibrations])
    return Evaluation(scores, raw, chosen_by, np.array(kind.strengths)[best], slope, intercept)


def choose_strength(
    scores: Float[np.ndarray, "candidates strengths rows outputs"],
    raw: Float[np.ndarray, "candidates strengths rows outputs"],
    target: Target,
    groups: Int[np.ndarray, "samples"],
    rows: Int[np.ndarray, "rows"],
    kind: Kind,
) -> Int[np.ndarray, "candidates"]:
    """Return the best strength on some rows: by log-loss if scores are probabilistic, otherwise by the main metric."""
    if raw.shape[1] == 1:
        return np.zeros(len(raw), dtype=int)
    if kind.probabilistic:
        chosen: np.ndarray = log_loss(raw, target.values[rows]).argmin(1)
    else:
        chosen = main_metric_each(scores, target, groups, rows, kind).argmax(1)
    return chosen


def _calibrate(
    raw: Float[np.ndarray, "candidates rows outputs"], target: Target, rows: Int[np.ndarray, "rows"], kind: Kind
) -> Calibration:
    """Fit a calibration on scores of unseen rows."""
    if not kind.probabilistic:
        return Calibration.none(len(raw))
    y = target.values[rows]
    return Calibration.classes(raw, y) if target.kind == "classes" else Calibration.binary(raw[..., 0], y)


def nested_best(
    evaluation: Evaluation, folds: Sequence[Fold]
) -> tuple[Float[np.ndarray, "rows outputs"], Float[np.ndarray, "rows outputs"], Int[np.ndarray, "folds"]]:
    """Choose the candidate on the inner folds of each outer fold; return its test scores, the raw ones, and the choice per
    fold."""
    chosen = evaluation.inner.argmax(1)
    scores, raw = np.empty(evaluation.scores.shape[1:]), np.empty(evaluation.scores.shape[1:])
    for candidate, fold in zip(chosen, folds, strict=True):
        scores[fold.test] = evaluation.scores[candidate, fold.test]
        raw[fold.test] = evaluation.raw[candidate, fold.test]
    return scores, raw, chosen


Measure = Callable[[Int[np.ndarray, "draws rows"]], Float[np.ndarray, "draws"]]


def main_measure(
    scores: Float[np.ndarray, "rows outputs"], target: Target, groups: Int[np.ndarray, "rows"], *, within: bool = False
) -> tuple[str, Measure]:
    """Return the main metric, used for choices and reported first: AUROC (pooled or within problems), R², or macro AUROC."""
    y = target.values
    if target.kind == "real":
        return "r2", lambda weights: metrics.r2(scores[:, 0], y, weights)
    if target.kind == "classes":
        return "auroc", lambda weights: metrics.macro_auroc(scores, y, weights)
    if within:
        return "auroc", lambda weights: metrics.within_auroc(scores[:, 0], y, weights, groups)
    return "auroc", lambda weights: metrics.auroc(scores[:, 0], y, weights)


def main_estimate(
    scores: Float[np.ndarray, "rows outputs"],
    target: Target,
    groups: Int[np.ndarray, "rows"],
    draws: Int[np.ndarray, "draws rows"],
    *,
    within: bool = False,
    widening: float = WIDENING,
) -> Estimate:
    """Return the main metric with its interval."""
    name, measure = main_measure(scores, target, groups, within=within)
    metric = "within_auroc" if within else name
    return _widen_degenerate(metric, estimate(name, measure, draws, widening), target, groups, draws, widening)


def _widen_degenerate(
    name: str,
    found: Estimate,
    target: Target,
    groups: Int[np.ndarray, "rows"],
    draws: Int[np.ndarray, "draws rows"],
    widening: float,
) -> Estimate:
    """Widen the interval of a metric that is exactly 0 or 1, for which every draw of problems gives the same value.

    The interval is that of as many independent samples as problems were drawn (or groups of rows that are always drawn
    together).
    """
    if target.kind != "binary" or found.value not in (0.0, 1.0) or name not in ("auroc", "within_auroc", "accuracy"):
        return found
    y = target.values
    parts = (
        (y, ~y)
        if name == "auroc"
        else (mixed(y, groups),)
        if name == "within_auroc"
        else (np.ones(len(y), dtype=bool),)
    )
    counts = [np.unique(draws[:, part], axis=1).shape[1] for part in parts]
    low, high = auroc(found.value, *counts) if name == "auroc" else exact(found.value, *counts)
    ends = (found.value + widening * (end - found.value) for end in (low, high))
    return Estimate(found.metric, found.value, *(min(1.0, max(0.0, end)) for end in ends))


def all_estimates(
    scores: Float[np.ndarray, "rows outputs"],
    raw: Float[np.ndarray, "rows outputs"],
    target: Target,
    groups: Int[np.ndarray, "rows"],
    draws: Int[np.ndarray, "draws rows"],
    *,
    within: bool = False,
    widening: float = WIDENING,
) -> dict[str, Estimate]:
    """Return all metrics of a target's kind by name, with intervals."""
    y = target.values
    name, main = main_measure(scores, target, groups)
    measures: dict[str, Measure] = {name: main}
    if target.kind == "real":
        measures["spearman"] = lambda weights: metrics.spearman(scores[:, 0], y, weights)
    elif target.kind == "classes":
        measures |= forecast_measures(raw, target)
    else:
        if mixed(y, groups).any():
            measures["within_auroc"] = lambda weights: metrics.within_auroc(scores[:, 0], y, weights, groups)
        measures["auprc"] = lambda weights: metrics.auprc(scores[:, 0], y, weights)
        if not within:  # scores that compare only within a problem are not probabilities
            measures |= forecast_measures(raw, target)
    return {
        name: _widen_degenerate(name, estimate(name, measure, draws, widening), target, groups, draws, widening)
        for name, measure in measures.items()
    }


def forecast_measures(raw: Float[np.ndarray, "rows outputs"], target: Target) -> dict[str, Measure]:
    """Return the metrics of log-odds or logits as a forecast, by name."""
    y = target.values
    if target.kind == "classes":
        return {"accuracy": lambda weights: metrics.class_accuracy(raw, y, weights)}
    said = 1 / (1 + np.exp(-raw[:, 0].clip(-500, 500)))
    return {
        "accuracy": lambda weights: metrics.accuracy(said, y, weights),
        "brier": lambda weights: metrics.brier(said, y, weights),
        "ece": lambda weights: metrics.ece(said, y, weights),
    }


def main_metric_each(
    scores: Float[np.ndarray, "candidates strengths rows outputs"],
    target: Target,
    groups: Int[np.ndarray, "samples"],
    rows: Int[np.ndarray, "rows"],
    kind: Kind,
) -> Float[np.ndarray, "candidates strengths"]:
    """Return the main metric of each candidate and strength on some rows; -inf where it is undefined."""
    once = np.ones((1, len(rows)), dtype=int)
    part = Target(target.name, target.kind, target.values[rows], target.classes)
    found = [
        [main_measure(one, part, groups[rows], within=kind.within)[1](once)[0] for one in candidate]
        for candidate in scores
    ]
    return np.nan_to_num(np.array(found), nan=-np.inf)
