"""Calibrated scores are log-odds: on data with known probabilities, and compared with scikit-learn tuned by log-loss."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.calibration import _SigmoidCalibration
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from probes import metrics
from probes.calibration import LEAST_SLOPE, Calibration
from probes.evaluation import Evaluation, evaluate
from probes.folds import nested_folds
from probes.kinds import KINDS
from probes.kinds.linear import LinearProbes
from probes.labels import Target


def known(n: int, d: int, strength: float, share: float, seed: int = 0, attempts: int = 1) -> Any:
    """Rows, labels drawn with known probabilities, these, and groups of attempts whose rows are alike."""
    generator = np.random.default_rng(seed)
    groups = np.repeat(np.arange(n // attempts), attempts)
    X = generator.normal(size=(n // attempts, d))[groups] + 0.1 * generator.normal(size=(n, d))
    f = strength * X[:, 0] + np.log(share / (1 - share))
    p = 1 / (1 + np.exp(-f))
    return X, generator.random(n) < p, p, groups


def said(found: Evaluation) -> np.ndarray:
    return 1 / (1 + np.exp(-found.raw[0, :, 0]))


def measured(p: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    once = np.ones((1, len(y)), dtype=int)
    return float(metrics.brier(p, y, once)[0]), float(metrics.ece(p, y, once)[0])


@pytest.mark.parametrize("name", ["logistic", "mean_difference", "lda"])
@pytest.mark.parametrize(
    ("n", "d", "strength", "share", "attempts", "above"),
    [(400, 6, 2.0, 0.5, 1, 0.01), (600, 10, 2.0, 0.1, 1, 0.01), (480, 4, 2.0, 0.4, 4, 0.02)],
)
def test_log_odds_are_near_the_best_there_is(
    name: str, n: int, d: int, strength: float, share: float, attempts: int, above: float
) -> None:
    """Balanced, rare, and in groups: a Brier score next to that of the true probabilities."""
    X, y, p, groups = known(n, d, strength, share, attempts=attempts)
    target = Target.of("label", y.tolist())
    (found,) = evaluate(torch.from_numpy(X)[None], [target], groups, nested_folds(target, groups), KINDS[name])
    brier, ece = measured(said(found), y)
    best, its_ece = measured(p, y)
    assert brier < best + above
    assert ece < its_ece + 0.04


@pytest.mark.parametrize("name", ["logistic", "mean_difference", "lda"])
@pytest.mark.parametrize("strength", [0.0, 3.0])
def test_few_rows_of_many_features_do_not_look_certain(name: str, strength: float) -> None:
    """120 rows of 600 features: no worse than scikit-learn, and than the share of True; uncalibrated, it is far worse."""
    X, y, _, groups = known(120, 600, strength, 0.5)
    target = Target.of("label", y.tolist())
    folds = nested_folds(target, groups)
    (found,) = evaluate(torch.from_numpy(X)[None], [target], groups, folds, KINDS[name])
    brier, ece = measured(said(found), y)
    reference = np.zeros(120)
    model = make_pipeline(StandardScaler(), LogisticRegressionCV(Cs=[1e-4, 1e-3, 1e-2], scoring="neg_log_loss", cv=3))
    for fold in folds:
        reference[fold.test] = model.fit(X[fold.train], y[fold.train]).predict_proba(X[fold.test])[:, 1]
    assert brier < min(measured(reference, y)[0], 0.25) + 0.015
    assert ece < 0.13


def test_log_odds_agree_with_scikit_learn_chosen_by_the_log_loss() -> None:
    X, y, _, groups = known(500, 8, 1.5, 0.3, seed=2)
    target = Target.of("label", y.tolist())
    folds = nested_folds(target, groups)
    (found,) = evaluate(torch.from_numpy(X)[None], [target], groups, folds, KINDS["logistic"])
    reference = np.zeros(500)
    model = make_pipeline(
        StandardScaler(), LogisticRegressionCV(Cs=np.logspace(-4, 2, 7), scoring="neg_log_loss", cv=3)
    )
    for fold in folds:
        reference[fold.test] = model.fit(X[fold.train], y[fold.train]).predict_proba(X[fold.test])[:, 1]
    assert np.abs(said(found) - reference).mean() < 0.03
    assert measured(said(found), y)[0] == pytest.approx(measured(reference, y)[0], abs=0.004)


def test_a_refit_is_calibrated_as_it_is_saved() -> None:
    """The probe of all rows, with its slope and intercept folded in, on rows that nothing has seen."""
    X, y, _, groups = known(400, 6, 2.0, 0.3)
    target = Target.of("label", y.tolist())
    kind = KINDS["logistic"]
    (found,) = evaluate(torch.from_numpy(X)[None], [target], groups, nested_folds(target, groups), kind)
    fitted = kind.fit(
        torch.from_numpy(X)[None], torch.from_numpy(y), torch.from_numpy(groups), torch.from_numpy(found.strength)
    )
    assert isinstance(fitted, LinearProbes)
    saved = found.calibration(0)[0].probes(fitted)
    new, label, p, _ = known(4000, 6, 2.0, 0.3, seed=9)
    f = saved.scores(torch.from_numpy(new)[None])[0, 0, 0].numpy()
    brier, ece = measured(1 / (1 + np.exp(-f)), label)
    assert brier < measured(p, label)[0] + 0.006
    assert ece < 0.04


def test_slope_and_intercept_are_platts() -> None:
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(3, 200)) * [[1], [30], [0.01]]
    y = generator.random(200) < 1 / (1 + np.exp(-scores[0]))
    scores[1:] += y * [[20], [0.01]]
    found = Calibration.binary(scores, y)
    for number in range(3):
        reference = _SigmoidCalibration().fit(scores[number], y)
        assert found.slope[number] == pytest.approx(-reference.a_, rel=2e-3)
        assert found.intercept[number] == pytest.approx(-reference.b_, rel=2e-3, abs=2e-3)


def test_a_probe_that_does_worse_than_chance_says_the_share_of_true() -> None:
    y = np.arange(100) < 25
    found = Calibration.binary(np.stack([np.where(y, -1.0, 1.0), np.zeros(100)]), y)
    assert found.slope[0] == LEAST_SLOPE
    share = 1 / (1 + np.exp(-found(np.zeros((2, 1, 1)))[:, 0, 0]))
    assert share == pytest.approx([0.25, 0.25], abs=0.02)


def test_logits_of_classes_are_calibrated() -> None:
    """Logits three times too large are brought back."""
    generator = np.random.default_rng(1)
    logits = generator.normal(size=(3000, 4)) * 1.5
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    y = np.array([generator.choice(4, p=p) for p in chances])
    found = Calibration.classes(np.stack([3 * logits, 0.2 * logits]), y)
    assert found.slope == pytest.approx([1 / 3, 5], rel=0.08)


def test_penalties_are_chosen_by_the_log_loss_not_by_rank() -> None:
    """Rank order is perfect under every penalty; the log-loss tells them apart, and the strongest is not taken."""
    generator = np.random.default_rng(0)
    y = np.arange(200) % 2 == 0
    X = torch.from_numpy(np.where(y, 3.0, -3.0)[:, None] + 0.1 * generator.normal(size=(200, 2)))[None]
    target = Target.of("label", y.tolist())
    (found,) = evaluate(X, [target], np.arange(200), nested_folds(target, np.arange(200)), KINDS["logistic"])
    assert found.strength[0] == max(KINDS["logistic"].strengths)
    assert measured(said(found), y)[0] < 0.001
