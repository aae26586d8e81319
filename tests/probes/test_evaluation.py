import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from probes.dataset import OneClassError
from probes.evaluation import (
    WIDENING,
    bootstrap_weights,
    cross_validate,
    estimate,
    evaluate,
    nested_best,
    nested_folds,
    shuffle_labels,
    weighted_auroc,
)


def test_folds_never_split_a_problem_and_are_stratified():
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 3)
    y = generator.random(120) < 0.3
    folds = nested_folds(y, groups)
    assert len(folds) == 5
    assert sorted(np.concatenate([fold.test for fold in folds])) == list(range(120))
    for fold in folds:
        assert not set(groups[fold.train]) & set(groups[fold.test])
        assert abs(y[fold.test].mean() - y.mean()) < 0.1
        assert len(fold.inner) == 3
        for train, test in fold.inner:
            assert not set(groups[fold.train][train]) & set(groups[fold.train][test])


def test_fewer_folds_where_the_rarer_class_has_fewer_problems():
    y = np.array([True, True, True] + [False] * 20)
    folds = nested_folds(y, np.arange(23))
    assert len(folds) == 3
    assert all(len(fold.inner) == 2 for fold in folds)

    y[2] = False
    folds = nested_folds(y, np.arange(23))
    assert len(folds) == 2
    assert all(fold.inner == () for fold in folds)
    X = torch.randn(2, 23, 4, generator=torch.Generator().manual_seed(0))
    assert (evaluate(X, y, folds).inner_auroc == 0.5).all()

    y[1] = False
    with pytest.raises(OneClassError, match=r"23 samples \(1 True\) of 23 problems cannot be split"):
        nested_folds(y, np.arange(23))


def test_problem_identity_does_not_leak():
    """Each problem's attempts look alike and share a label drawn at random: nothing carries over to another problem."""
    generator = torch.Generator().manual_seed(3)
    groups = np.repeat(np.arange(40), 5)
    y = np.repeat(np.arange(40) % 2 == 0, 5)
    identity = torch.randn(40, 96, generator=generator)[torch.from_numpy(groups)]
    X = (identity + 0.1 * torch.randn(200, 96, generator=generator))[None]
    draws = bootstrap_weights(groups)

    grouped = estimate(evaluate(X, y, nested_folds(y, groups)).scores[0], y, draws)
    assert grouped.low < 0.5 < grouped.high

    # The same data, split as if rows were independent: this is the leak that the folds above prevent.
    leaky = estimate(evaluate(X, y, nested_folds(y, np.arange(200))).scores[0], y, draws)
    assert leaky.auroc > 0.95


def test_the_scaler_and_the_probe_see_training_rows_only():
    """Moving the test rows must move nothing that was learned from the others."""
    generator = torch.Generator().manual_seed(0)
    y = np.arange(40) % 2 == 0
    X = torch.randn(1, 40, 6, generator=generator)
    splits = [(np.arange(20), np.arange(20, 40))]
    scores = cross_validate(X, y, splits)
    changed = X.clone()
    changed[:, 30:] += 1000
    np.testing.assert_array_equal(cross_validate(changed, y, splits)[..., 20:30], scores[..., 20:30])
    assert np.isnan(scores[..., :20]).all()


def test_the_best_of_many_noise_layers_is_not_flattered():
    generator = torch.Generator().manual_seed(1)
    y = np.arange(60) % 2 == 0
    groups = np.arange(60)
    X = torch.randn(40, 60, 16, generator=generator)
    folds = nested_folds(y, groups)
    evaluation = evaluate(X, y, folds)
    best, chosen = nested_best(evaluation, folds)
    assert len(chosen) == len(folds)
    naive = max(roc_auc_score(y, scores) for scores in evaluation.scores)
    honest = estimate(best, y, bootstrap_weights(groups))
    assert naive > 0.65
    assert honest.low < 0.5 < honest.high


def test_the_planted_layer_is_chosen_in_every_fold():
    generator = torch.Generator().manual_seed(2)
    y = np.arange(60) % 2 == 0
    X = torch.randn(5, 60, 100, generator=generator)
    X[3, :, :4] += 2 * torch.from_numpy(y).float()[:, None]
    folds = nested_folds(y, np.arange(60))
    evaluation = evaluate(X, y, folds)
    scores, chosen = nested_best(evaluation, folds)
    assert set(chosen) == {3}
    np.testing.assert_array_equal(scores, evaluation.scores[3])


def test_intervals_cover_chance_on_shuffled_labels():
    generator = torch.Generator().manual_seed(4)
    groups = np.arange(80)
    y = np.arange(80) < 32
    X = torch.randn(1, 80, 12, generator=generator)
    draws = bootstrap_weights(groups, draws=300)
    covered = 0
    for seed in range(40):
        shuffled = shuffle_labels(y, groups, seed)
        folds = nested_folds(shuffled, groups, seed)
        found = estimate(evaluate(X, shuffled, folds).scores[0], shuffled, draws)
        covered += found.low <= 0.5 <= found.high
    assert covered >= 36  # the plain percentiles would do so in 34 or fewer


def test_shuffling_moves_the_labels_of_a_problem_together():
    groups = np.array([2, 0, 1, 2, 0, 1, 3, 3, 4, 4])
    y = np.array([True, False, True, True, False, False, True, False, False, False])
    blocks = sorted(tuple(y[groups == g]) for g in range(5))
    moved = 0
    for seed in range(10):
        shuffled = shuffle_labels(y, groups, seed)
        assert sorted(tuple(shuffled[groups == g]) for g in range(5)) == blocks
        moved += not np.array_equal(shuffled, y)
    assert moved >= 8


def test_bootstrap_agrees_with_a_slow_loop():
    """The slow way: draw problems one by one, gather their rows, compare every pair of them."""
    generator = np.random.default_rng(5)
    groups = np.repeat(np.arange(25), 3)
    y = generator.random(75) < 0.4
    scores = np.round(generator.normal(size=75) + y, 1)  # rounded, so that there are ties
    fast = estimate(scores, y, bootstrap_weights(groups, seed=1, draws=3000))

    slow = []
    for _ in range(3000):
        rows = np.concatenate([np.flatnonzero(groups == g) for g in generator.integers(25, size=25)])
        if len(set(y[rows])) == 2:
            difference = scores[rows][y[rows]][:, None] - scores[rows][~y[rows]]
            slow.append((difference > 0).mean() + (difference == 0).mean() / 2)
    low, high = np.percentile(slow, [2.5, 97.5]) * WIDENING + fast.auroc * (1 - WIDENING)
    assert fast.auroc == roc_auc_score(y, scores)
    assert fast.low == pytest.approx(low, abs=0.02)
    assert fast.high == pytest.approx(high, abs=0.02)


def test_weighted_auroc_is_the_auroc_of_repeated_rows():
    generator = np.random.default_rng(6)
    y = generator.random(30) < 0.5
    scores = generator.integers(8, size=30) / 4
    weights = generator.integers(4, size=(50, 30))
    expected = [roc_auc_score(np.repeat(y, w), np.repeat(scores, w)) for w in weights]
    np.testing.assert_allclose(weighted_auroc(scores, y, weights), expected, atol=1e-12)


def test_draws_with_one_class_are_skipped():
    y = np.array([True, False])
    weights = np.array([[2, 0], [1, 1], [0, 2]])
    scores = np.array([1.0, 0.0])
    np.testing.assert_array_equal(weighted_auroc(scores, y, weights), [np.nan, 1.0, np.nan])
    assert estimate(scores, y, weights).low == 1.0
