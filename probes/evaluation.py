"""How well a label can be read, said honestly.

Method:
    1. Outer folds split *problems*, stratified by label (`folds`).
    2. Inside the training part of each outer fold, inner folds of the same kind score every candidate (a key at a position)
       and every strength.
    3. Whatever is chosen (a candidate's strength; the best candidate) is chosen on inner folds and scored on the outer test
       part, which played no part in the choice. A maximum over layers that is chosen and reported on the same folds is
       flattery.
    4. Test scores of all outer folds together give the metrics, and problems drawn with replacement their intervals
    (`intervals`).
    5. Baselines go through the same steps (`baselines`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from probes import metrics
from probes.cross_validation import Case, Tested, cross_validate, whole
from probes.folds import Fold
from probes.intervals import WIDENING, estimate
from probes.kinds import Kind
from probes.labels import Target
from probes.report import Estimate


@dataclass(frozen=True)
class Evaluation:
    """Nested scores of several candidates on the same rows.

    Attributes:
        scores: of each row by a probe that was neither fitted nor chosen on its problem, comparable across folds,
            `[candidates, rows, outputs]`.
        raw: the same as the probe gave them: log-odds, values or logits.
        inner: the main metric on the inner folds, at the strength chosen there, `[folds, candidates]`.
        strength: for a refit on all rows: the best over the outer folds, `[candidates]`.
    """

    scores: Float[np.ndarray, "candidates rows outputs"]
    raw: Float[np.ndarray, "candidates rows outputs"]
    inner: Float[np.ndarray, "folds candidates"]
    strength: Float[np.ndarray, "candidates"]

    @classmethod
    def concatenate(cls, parts: Sequence["Evaluation"]) -> "Evaluation":
        """Join evaluations of different candidates on the same folds."""
        return cls(
            np.concatenate([part.scores for part in parts]),
            np.concatenate([part.raw for part in parts]),
            np.concatenate([part.inner for part in parts], axis=1),
            np.concatenate([part.strength for part in parts]),
        )


def evaluate(
    X: Float[Tensor, "candidates rows ..."],
    targets: Sequence[Target],
    groups: Int[np.ndarray, "rows"],
    folds: Sequence[Fold],
    kind: Kind,
) -> list[Evaluation]:
    """Evaluate one probe per target and candidate, its strength chosen on inner folds and its scores taken on outer ones.

    Targets are labels of the same rows: the one that is asked about, and shuffled ones beside it.
    """
    outer = [[Case(target, fold.train, fold.test) for fold in folds] for target in targets]
    # With one candidate and one strength there is nothing to choose, and nothing to look for on inner folds.
    chooses = len(X) * len(kind.strengths) > 1
    inner = [[_inner_cases(target, fold) if chooses else [] for fold in folds] for target in targets]
    tested: list[list[list[Tested]]] = [[[] for _ in folds] for _ in targets]
    for place in range(len(folds)):
        cases = [[outer[t][place], *inner[t][place]] for t in range(len(targets))]
        found = iter(cross_validate(X, [case for part in cases for case in part], groups, kind))
        for t, part in enumerate(cases):
            tested[t][place] = list(islice(found, len(part)))
    return [_evaluation(X, outer[t], inner[t], tested[t], groups, kind) for t in range(len(targets))]


def _inner_cases(target: Target, fold: Fold) -> list[Case]:
    """Return the inner folds of an outer one; not those in which shuffling has left a class nothing to train on."""
    cases = [Case(target, fold.train[train], fold.train[test]) for train, test in fold.inner]
    if target.kind == "real":
        return cases
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
    """Choose each candidate's strength on the inner folds of each outer one, and take its scores there."""
    target, number, everything = outer[0].target, np.arange(len(X)), np.arange(len(groups))
    at_each, raw_at_each = whole(outer, [found[0] for found in tested], len(groups))
    scores, raw = at_each[:, 0].copy(), raw_at_each[:, 0].copy()
    chosen_by = np.empty((len(outer), len(X)))
    for place, case in enumerate(outer):
        # Without inner folds nothing is known: every choice ties, and the first is taken.
        found = np.zeros((len(X), len(kind.strengths)))
        if inner[place]:
            inside, _ = whole(inner[place], tested[place][1:], len(groups))
            rows = np.concatenate([one.test for one in inner[place]])
            found = main_metric_each(inside[:, :, rows], target, groups, rows, kind)
        chosen = found.argmax(1)
        chosen_by[place] = found[number, chosen]
        scores[:, case.test] = at_each[number, chosen][:, case.test]
        raw[:, case.test] = raw_at_each[number, chosen][:, case.test]
    best = main_metric_each(at_each, target, groups, everything, kind).argmax(1)
    return Evaluation(scores, raw, chosen_by, np.array(kind.strengths)[best])


def nested_best(
    evaluation: Evaluation, folds: Sequence[Fold]
) -> tuple[Float[np.ndarray, "rows outputs"], Float[np.ndarray, "rows outputs"], Int[np.ndarray, "folds"]]:
    """Choose the candidate on the inner folds of each outer fold; return its test scores, raw ones, and which it was."""
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
    """Return the metric that is chosen by and reported first: AUROC (pooled or within problems), R², or macro AUROC."""
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
    return estimate(*main_measure(scores, target, groups, within=within), draws, widening)


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
    """Return every metric of a target's kind, by name, each with its interval."""
    y = target.values
    name, main = main_measure(scores, target, groups)
    measures: dict[str, Measure] = {name: main}
    if target.kind == "real":
        measures["spearman"] = lambda weights: metrics.spearman(scores[:, 0], y, weights)
    elif target.kind == "classes":
        measures["accuracy"] = lambda weights: metrics.class_accuracy(raw, y, weights)
    else:
        if has_contrast(y, groups):
            measures["within_auroc"] = lambda weights: metrics.within_auroc(scores[:, 0], y, weights, groups)
        measures["auprc"] = lambda weights: metrics.auprc(scores[:, 0], y, weights)
        if not within:  # scores that compare within a problem only are no probabilities
            said = 1 / (1 + np.exp(-raw[:, 0].clip(-500, 500)))
            measures["accuracy"] = lambda weights: metrics.accuracy(said, y, weights)
            measures["brier"] = lambda weights: metrics.brier(said, y, weights)
            measures["ece"] = lambda weights: metrics.ece(said, y, weights)
    return {name: estimate(name, measure, draws, widening) for name, measure in measures.items()}


def has_contrast(y: Float[np.ndarray, "rows"], groups: Int[np.ndarray, "rows"]) -> bool:
    """Tell whether some problem has rows of both classes."""
    return bool(np.intersect1d(groups[y.astype(bool)], groups[~y.astype(bool)]).size)


def main_metric_each(
    scores: Float[np.ndarray, "candidates strengths rows outputs"],
    target: Target,
    groups: Int[np.ndarray, "samples"],
    rows: Int[np.ndarray, "rows"],
    kind: Kind,
) -> Float[np.ndarray, "candidates strengths"]:
    """Return the main metric of each candidate and strength on some rows; the worst value where it is not defined."""
    once = np.ones((1, len(rows)), dtype=int)
    part = Target(target.name, target.kind, target.values[rows], target.classes)
    found = [
        [main_measure(one, part, groups[rows], within=kind.within)[1](once)[0] for one in candidate]
        for candidate in scores
    ]
    return np.nan_to_num(np.array(found), nan=-np.inf)
