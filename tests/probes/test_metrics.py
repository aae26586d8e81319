"""Each weighted metric against scikit-learn or scipy on rows that are actually repeated."""

from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score, average_precision_score, brier_score_loss, r2_score, roc_auc_score

from probes import metrics
from probes.bootstrap import WIDENING, bootstrap_weights, estimate

GENERATOR = np.random.default_rng(6)
Y = GENERATOR.random(40) < 0.5
SCORES = GENERATOR.integers(8, size=40) / 8  # few values, so that there are ties
NUMBERS = GENERATOR.normal(size=40).round(1)
WEIGHTS = GENERATOR.integers(4, size=(30, 40))


@pytest.mark.parametrize(
    ("ours", "theirs", "y"),
    [
        (metrics.auroc, roc_auc_score, Y),
        (metrics.auprc, average_precision_score, Y),
        (metrics.brier, brier_score_loss, Y),
        (metrics.accuracy, lambda y, p: accuracy_score(y, p > 0.5), Y),
        (metrics.r2, r2_score, NUMBERS),
        (metrics.spearman, lambda y, s: spearmanr(y, s).statistic, NUMBERS),
    ],
)
def test_weights_are_repeated_rows(ours: Any, theirs: Any, y: Any) -> None:
    expected = [theirs(np.repeat(y, w), np.repeat(SCORES, w)) for w in WEIGHTS]
    np.testing.assert_allclose(ours(SCORES, y, WEIGHTS), expected, atol=1e-9)


def test_calibration_error_by_a_loop_over_bins() -> None:
    for weights, found in zip(WEIGHTS, metrics.ece(SCORES, Y, WEIGHTS), strict=True):
        said, true = np.repeat(SCORES, weights), np.repeat(Y, weights)
        expected = 0.0
        for lower in np.arange(10) / 10:
            inside = (said >= lower) & ((said < lower + 0.1) | (lower > 0.85))
            if inside.any():
                expected += abs(true[inside].mean() - said[inside].mean()) * inside.mean()
        assert found == pytest.approx(expected, abs=1e-9)


def test_within_problems_compares_attempts_of_one_problem_only() -> None:
    """Scores that rank problems perfectly and attempts the wrong way round."""
    groups = np.repeat(np.arange(10), 4)
    y = np.tile([True, False, False, True], 10)
    y[:20] = [True, True, False, True] * 5
    scores = groups * -10.0 - y
    assert metrics.within_auroc(scores, y, np.ones((1, 40), int), groups)[0] == 0
    weights = bootstrap_weights(groups, draws=20)
    pairs = {g: int(y[groups == g].sum()) * int((~y[groups == g]).sum()) for g in range(10)}
    mixed = scores.copy()
    mixed[groups % 2 == 0] *= -1
    counts = weights[:, ::4]
    expected = [
        sum(c[g] * pairs[g] * (g % 2 == 0) for g in range(10)) / sum(c[g] * pairs[g] for g in range(10)) for c in counts
    ]
    np.testing.assert_allclose(metrics.within_auroc(mixed + 0.0 * y, y, weights, groups), expected, atol=1e-12)


def test_one_against_the_rest_is_averaged_over_classes() -> None:
    y = GENERATOR.integers(3, size=40)
    scores = GENERATOR.random((40, 3))
    scores /= scores.sum(1, keepdims=True)
    expected = roc_auc_score(y, scores, multi_class="ovr", average="macro")
    assert metrics.macro_auroc(scores, y, np.ones((1, 40), int))[0] == pytest.approx(expected)


def test_bootstrap_agrees_with_a_slow_loop() -> None:
    """The slow way: draw problems one by one, gather their rows, compare every pair of them."""
    generator = np.random.default_rng(5)
    groups = np.repeat(np.arange(25), 3)
    y = generator.random(75) < 0.4
    scores = np.round(generator.normal(size=75) + y, 1)
    weights = bootstrap_weights(groups, seed=1, draws=3000)
    fast = estimate("auroc", lambda w: metrics.auroc(scores, y, w), weights)
    slow = []
    for _ in range(3000):
        rows = np.concatenate([np.flatnonzero(groups == g) for g in generator.integers(25, size=25)])
        if len(set(y[rows])) == 2:
            difference = scores[rows][y[rows]][:, None] - scores[rows][~y[rows]]
            slow.append((difference > 0).mean() + (difference == 0).mean() / 2)
    low, high = np.percentile(slow, [2.5, 97.5]) * WIDENING + fast.value * (1 - WIDENING)
    assert fast.value == pytest.approx(roc_auc_score(y, scores))
    assert fast.low == pytest.approx(low, abs=0.02)
    assert fast.high == pytest.approx(high, abs=0.02)


def test_draws_with_one_class_are_skipped() -> None:
    y = np.array([True, False])
    weights = np.array([[2, 0], [1, 1], [0, 2]])
    scores = np.array([1.0, 0.0])
    np.testing.assert_array_equal(metrics.auroc(scores, y, weights), [np.nan, 1.0, np.nan])
    assert estimate("auroc", lambda w: metrics.auroc(scores, y, w), weights).low == 1.0
