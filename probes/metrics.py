"""Metrics of scores, for many weightings of the rows at once.

Every metric takes `weights`, `[draws, rows]`: the weight of each row. A single draw of ones gives the metric itself; draws
of whole problems give its bootstrap distribution. A draw in which a metric is undefined (one class only) gives NaN.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

BINS = 10
"""Number of equal-width bins of the expected calibration error."""

RowScores = Float[np.ndarray, "rows"]
RowLabels = Bool[np.ndarray, "rows"]
RowWeights = Int[np.ndarray, "draws rows"]
Draws = Float[np.ndarray, "draws"]


def auroc(scores: RowScores, y: RowLabels, weights: RowWeights) -> Draws:
    """Return the AUROC: the share of (True, False) pairs in the correct order, with ties counted half."""
    trues, falses = _by_score(scores, y, weights)
    in_order = (trues * (falses.cumsum(1) - falses / 2)).sum(1)
    return _ratio(in_order, trues.sum(1) * falses.sum(1))


def within_auroc(scores: RowScores, y: RowLabels, weights: RowWeights, groups: Int[np.ndarray, "rows"]) -> Draws:
    """Return the AUROC over (True, False) pairs of the same problem; NaN if no problem has both classes.

    All rows of a problem must have the same weight.
    """
    in_order = np.zeros(len(weights))
    pairs = np.zeros(len(weights))
    for group in np.unique(groups[y]):
        rows = groups == group
        n_pairs = int(y[rows].sum()) * int((~y[rows]).sum())
        if n_pairs:
            once = np.ones((1, int(rows.sum())), dtype=int)
            counted = weights[:, np.flatnonzero(rows)[0]]
            in_order += counted * n_pairs * auroc(scores[rows], y[rows], once)[0]
            pairs += counted * n_pairs
    return _ratio(in_order, pairs)


def auprc(scores: RowScores, y: RowLabels, weights: RowWeights) -> Draws:
    """Return the average precision: precision at each threshold, weighted by the recall that it adds."""
    trues, falses = (part[:, ::-1] for part in _by_score(scores, y, weights))
    caught = trues.cumsum(1)
    precision = _ratio(caught, caught + falses.cumsum(1))
    return _ratio(np.nansum(precision * trues, axis=1), trues.sum(1))


def accuracy(probabilities: RowScores, y: RowLabels, weights: RowWeights) -> Draws:
    """Return the accuracy at a threshold of ½."""
    return _ratio(weights @ ((probabilities > 0.5) == y), weights.sum(1))


def brier(probabilities: RowScores, y: RowLabels, weights: RowWeights) -> Draws:
    """Return the mean squared error of probabilities."""
    return _ratio(weights @ (probabilities - y) ** 2, weights.sum(1))


def ece(probabilities: RowScores, y: RowLabels, weights: RowWeights) -> Draws:
    """Return the expected calibration error: |observed − predicted| per bin of probability, averaged over rows."""
    inside = bins(probabilities)[:, None] == np.arange(BINS)
    return _ratio(np.abs(weights @ (inside * (probabilities - y)[:, None])).sum(1), weights.sum(1))


def bins(probabilities: RowScores) -> Int[np.ndarray, "rows"]:
    """Return the bin of each probability."""
    found: np.ndarray = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    return found


def r2(scores: RowScores, y: Float[np.ndarray, "rows"], weights: RowWeights) -> Draws:
    """Return R², the explained share of the variance; negative if the mean would predict better."""
    total = weights.sum(1)
    variance = weights @ y**2 - _ratio((weights @ y) ** 2, total)
    return 1 - _ratio(weights @ (y - scores) ** 2, np.where(variance > 1e-12 * total, variance, 0))


def spearman(scores: RowScores, y: Float[np.ndarray, "rows"], weights: RowWeights) -> Draws:
    """Return Spearman's rank correlation, with ties at their mean rank; NaN if all are tied."""
    a, b = _ranks(scores, weights), _ranks(y, weights)
    total = weights.sum(1, keepdims=True)
    a, b = (ranks - _ratio((weights * ranks).sum(1, keepdims=True), total) for ranks in (a, b))
    covariance = (weights * a * b).sum(1)
    return _ratio(covariance, np.sqrt((weights * a * a).sum(1) * (weights * b * b).sum(1)))


def class_accuracy(scores: Float[np.ndarray, "rows classes"], y: Int[np.ndarray, "rows"], weights: RowWeights) -> Draws:
    """Return the share of rows whose highest score is their class's."""
    return _ratio(weights @ (scores.argmax(1) == y), weights.sum(1))


def macro_auroc(scores: Float[np.ndarray, "rows classes"], y: Int[np.ndarray, "rows"], weights: RowWeights) -> Draws:
    """Return the mean over classes of the AUROC of one against the rest."""
    mean: np.ndarray = np.mean([auroc(scores[:, k], y == k, weights) for k in range(scores.shape[1])], axis=0)
    return mean


def _by_score(scores: RowScores, y: RowLabels, weights: RowWeights) -> tuple[np.ndarray, np.ndarray]:
    """Return how many True and False rows have each distinct score, in ascending order, `[draws, distinct]`."""
    order = np.argsort(scores, kind="stable")
    firsts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))  # where each distinct score begins
    trues = np.add.reduceat(weights[:, order] * y[order], firsts, axis=1)
    falses = np.add.reduceat(weights[:, order] * ~y[order], firsts, axis=1)
    return trues, falses


def _ranks(values: RowScores, weights: RowWeights) -> Float[np.ndarray, "draws rows"]:
    """Return the middle rank of each row's value among the rows of each draw."""
    distinct, place = np.unique(values, return_inverse=True)
    counts = np.zeros((len(weights), len(distinct)))
    np.add.at(counts.T, place, weights.T)
    return (counts.cumsum(1) - counts / 2)[:, place]


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divide; NaN where the denominator is 0."""
    ratio: np.ndarray = np.divide(
        numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=denominator > 0
    )
    return ratio
