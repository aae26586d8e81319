from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from probes.bootstrap import bootstrap_weights
from probes.cross_validation import Case, cross_validate
from probes.evaluation import evaluate, main_estimate, nested_best
from probes.folds import nested_folds, shuffle_labels
from probes.kinds import KINDS
from probes.labels import Target

LOGISTIC = KINDS["logistic"]


def target(y: Any) -> Target:
    return Target.of("label", list(y))


def test_problem_identity_does_not_leak() -> None:
    """Each problem's attempts look alike and share a label drawn at random: nothing carries over to another problem."""
    generator = torch.Generator().manual_seed(3)
    groups = np.repeat(np.arange(40), 5)
    y = target(np.repeat(np.arange(40) % 2 == 0, 5))
    identity = torch.randn(40, 96, generator=generator)[torch.from_numpy(groups)]
    X = (identity + 0.1 * torch.randn(200, 96, generator=generator))[None]
    draws = bootstrap_weights(groups)

    grouped = main_estimate(evaluate(X, [y], groups, nested_folds(y, groups), LOGISTIC)[0].scores[0], y, groups, draws)
    assert grouped.low < 0.5 < grouped.high

    # The same data, split as if rows were independent: this is the leak that the folds above prevent.
    rows = np.arange(200)
    leaky = main_estimate(evaluate(X, [y], rows, nested_folds(y, rows), LOGISTIC)[0].scores[0], y, groups, draws)
    assert leaky.value > 0.95


def test_the_scaler_and_the_probe_see_training_rows_only() -> None:
    """Moving the test rows must move nothing that was learned from the others."""
    generator = torch.Generator().manual_seed(0)
    y, rows = target(np.arange(40) % 2 == 0), np.arange(40)
    X = torch.randn(1, 40, 6, generator=generator)
    cases = [Case(y, rows[:20], rows[20:])]
    (before,) = cross_validate(X, cases, rows, LOGISTIC)
    changed = X.clone()
    changed[:, 30:] += 1000
    (after,) = cross_validate(changed, cases, rows, LOGISTIC)
    np.testing.assert_array_equal(after.scores[:, :, :10], before.scores[:, :, :10])
    assert not np.isclose(after.scores[:, :, 10:], before.scores[:, :, 10:]).any()


def test_features_that_say_nothing_give_one_half() -> None:
    """Each fold's probe says its own share of True to all; ranked by that, folds would differ."""
    y, rows = target(np.arange(97) % 5 == 0), np.arange(97)
    (evaluation,) = evaluate(torch.zeros(1, 97, 1), [y], rows, nested_folds(y, rows), LOGISTIC)
    assert main_estimate(evaluation.scores[0], y, rows, bootstrap_weights(rows)).value == 0.5


def test_the_best_of_many_noise_layers_is_not_flattered() -> None:
    generator = torch.Generator().manual_seed(1)
    y, groups = target(np.arange(60) % 2 == 0), np.arange(60)
    X = torch.randn(40, 60, 16, generator=generator)
    folds = nested_folds(y, groups)
    evaluation = evaluate(X, [y], groups, folds, LOGISTIC)[0]
    best, _, chosen = nested_best(evaluation, folds)
    assert len(chosen) == len(folds)
    naive = max(roc_auc_score(y.values, scores[:, 0]) for scores in evaluation.scores)
    honest = main_estimate(best, y, groups, bootstrap_weights(groups))
    assert naive > 0.65
    assert honest.low < 0.5 < honest.high


def test_a_planted_direction_is_found_at_its_layer_by_every_kind() -> None:
    """AUROC of at least 0.99 where it is, and 0.5 within the interval where it is not."""
    generator = torch.Generator().manual_seed(2)
    groups = np.repeat(np.arange(60), 4)
    y = target((np.arange(240) // 2) % 2 == 0)
    X = torch.randn(3, 240, 64, generator=generator)
    direction = torch.nn.functional.normalize(torch.randn(64, generator=generator), dim=0)
    X[1] += 8 * (torch.from_numpy(y.values).float()[:, None] - 0.5) * direction
    folds = nested_folds(y, groups)
    draws = bootstrap_weights(groups)
    for name in ("logistic", "mean_difference", "lda", "contrast"):
        kind = KINDS[name]
        evaluation = evaluate(X, [y], groups, folds, kind)[0]
        scores, _, chosen = nested_best(evaluation, folds)
        assert set(chosen) == {1}, name
        np.testing.assert_array_equal(scores, evaluation.scores[1])
        found = [main_estimate(s, y, groups, draws, within=kind.within) for s in evaluation.scores]
        assert found[1].value >= 0.99, name
        assert found[0].low <= 0.5 <= found[0].high, name
        assert found[2].low <= 0.5 <= found[2].high, name


def test_numbers_and_classes_are_read_where_they_are_planted() -> None:
    generator = torch.Generator().manual_seed(3)
    groups = np.arange(150)
    number = torch.randn(150, generator=generator)
    X = torch.randn(2, 150, 20, generator=generator)
    X[1, :, 4] += 3 * number
    for label in (
        target(number.double().tolist()),
        target([f"c{int(n)}" for n in torch.bucketize(number, torch.tensor([-0.5, 0.5]))]),
    ):
        kind = KINDS["ridge" if label.kind == "real" else "multinomial"]
        folds = nested_folds(label, groups)
        evaluation = evaluate(X, [label], groups, folds, kind)[0]
        found = [main_estimate(s, label, groups, bootstrap_weights(groups)) for s in evaluation.scores]
        chance = 0.0 if label.kind == "real" else 0.5
        assert found[1].low > chance + 0.2
        assert found[0].low <= chance
        assert set(nested_best(evaluation, folds)[2]) == {1}


def test_intervals_cover_chance_on_shuffled_labels() -> None:
    """In at least 89 of 100 draws; the plain percentiles would do so in fewer."""
    generator = torch.Generator().manual_seed(4)
    groups = np.arange(80)
    y = target(np.arange(80) < 32)
    X = torch.randn(1, 80, 12, generator=generator)
    folds = nested_folds(y, groups)
    shuffled = [shuffle_labels(y, groups, folds, seed) for seed in range(100)]
    draws = bootstrap_weights(groups, draws=300)
    covered = 0
    for label, found in zip(shuffled, evaluate(X, shuffled, groups, folds, LOGISTIC), strict=True):
        estimate = main_estimate(found.scores[0], label, groups, draws)
        covered += estimate.low <= 0.5 <= estimate.high
    assert covered >= 89
