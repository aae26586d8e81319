"""Each kind against scikit-learn, or against an independent computation if scikit-learn has no such kind."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from probes.kinds import attention, contrast, lda, logistic, mean_difference, multinomial, ridge
from tests.probes.kinds.features import correlated

SHAPES = pytest.mark.parametrize(("rows", "d"), [(40, 150), (150, 40)])


@SHAPES
def test_ridge_agrees_with_scikit_learn(rows: int, d: int) -> None:
    X, y = correlated(2, rows + 20, d)
    strengths = torch.tensor([1e4, 1e2, 1.0])
    scores = ridge.fit(X[:, :rows], y[:rows], None, strengths).scores(X)
    for model in range(2):
        Z = X[model].double().numpy()
        scaler = StandardScaler().fit(Z[:rows])
        for place, alpha in enumerate(strengths.tolist()):
            reference = Ridge(alpha=alpha).fit(scaler.transform(Z[:rows]), y[:rows].double().numpy())
            np.testing.assert_allclose(scores[model, place, 0], reference.predict(scaler.transform(Z)), atol=1e-3)


@SHAPES
def test_lda_agrees_with_scikit_learn(rows: int, d: int) -> None:
    X, number = correlated(2, rows + 20, d)
    y = number > number.quantile(0.7)
    strengths = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    scores = lda.fit(X[:, :rows], y[:rows], None, strengths).scores(X)
    for model in range(2):
        Z = X[model].double().numpy()
        scaler = StandardScaler().fit(Z[:rows])
        for place, shrinkage in enumerate(strengths.tolist()):
            reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)
            reference.fit(scaler.transform(Z[:rows]), y[:rows].numpy())
            expected = reference.decision_function(scaler.transform(Z))
            np.testing.assert_allclose(scores[model, place, 0], expected, atol=1e-3)


@SHAPES
def test_multinomial_agrees_with_scikit_learn(rows: int, d: int) -> None:
    X, number = correlated(2, rows + 20, d)
    y = torch.bucketize(number, number.quantile(torch.tensor([0.3, 0.6, 0.8])))
    strengths = torch.tensor([1e-3, 1e-1, 1.0])
    scores = multinomial.fit(X[:, :rows], y[:rows], None, strengths).scores(X)
    assert scores.shape == (2, 3, 4, rows + 20)
    for model in range(2):
        Z = X[model].double().numpy()
        scaler = StandardScaler().fit(Z[:rows])
        for place, C in enumerate(strengths.double().tolist()):
            reference = LogisticRegression(C=C, tol=1e-10, max_iter=50_000, solver="newton-cg")
            reference.fit(scaler.transform(Z[:rows]), y[:rows].numpy())
            expected = reference.decision_function(scaler.transform(Z))
            np.testing.assert_allclose(scores[model, place].T, expected, atol=1e-3)


def test_multinomial_refuses_a_class_without_rows() -> None:
    with pytest.raises(ValueError, match=r"rows per class: \[2, 0, 1\]"):
        multinomial.fit(torch.randn(1, 3, 2), torch.tensor([0, 2, 0]), None, torch.tensor([1.0]))


def test_mean_difference_is_the_difference_of_means_and_scores_are_log_odds() -> None:
    X, number = correlated(2, 200, 30)
    y = number > number.median()
    probes = mean_difference.fit(X, y, None, torch.ones(1))
    for model in range(2):
        rows = X[model].double().numpy()
        direction = rows[y].mean(0) - rows[~y].mean(0)
        weight = probes.weight[model, 0, 0].numpy()
        assert weight @ direction / np.linalg.norm(weight) / np.linalg.norm(direction) == pytest.approx(1, abs=1e-9)
        line = StandardScaler().fit_transform((rows @ direction)[:, None])
        reference = LogisticRegression(C=1.0, tol=1e-10).fit(line, y.numpy())
        expected = reference.decision_function(line)
        np.testing.assert_allclose(probes.scores(X)[model, 0, 0], expected, atol=1e-3)


def test_contrast_agrees_with_scikit_learn_on_rows_centred_by_hand() -> None:
    X, number = correlated(2, 90, 20)
    groups = torch.arange(90) // 3
    y = number > number.median()
    strengths = torch.tensor([1e-2, 1.0])
    scores = contrast.fit(X, y, groups, strengths).scores(X)
    mixed = [g for g in range(30) if 0 < int(y[groups == g].sum()) < 3]
    kept = np.isin(groups, mixed)
    for model in range(2):
        rows = X[model].double().numpy()
        centered = np.concatenate([rows[groups == g] - rows[groups == g].mean(0) for g in range(30)])
        scale = centered[kept].std(0)
        for place, C in enumerate(strengths.double().tolist()):
            reference = LogisticRegression(C=C, tol=1e-10, max_iter=50_000, solver="newton-cg", fit_intercept=False)
            reference.fit(centered[kept] / scale, y.numpy()[kept])
            expected = (rows - rows.mean(0)) / scale @ reference.coef_[0]
            np.testing.assert_allclose(scores[model, place, 0], expected, atol=1e-3)


def test_contrast_sees_past_what_a_problem_shares() -> None:
    """Problems differ greatly along one direction that also tells the label between problems; attempts differ elsewhere."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(240) // 4
    y = torch.rand(240, generator=generator) < torch.where(groups % 2 == 0, 0.8, 0.2)
    X = torch.randn(1, 240, 12, generator=generator)
    X[0, :, 0] += 20.0 * (groups % 2 == 0)
    X[0, :, 1] += 3.0 * y
    weight = contrast.fit(X, y, groups, torch.tensor([0.1])).weight[0, 0, 0]
    assert weight[1].abs() > 10 * weight[0].abs()
    with pytest.raises(ValueError, match="no problem has attempts of both classes"):
        contrast.fit(X, groups % 2 == 0, groups, torch.tensor([0.1]))


def marked(n: int, most: int, d: int, *, first: int, mark: float, size: float) -> Any:
    """Samples of unlike lengths; one token of each, marked by feature 0, shows the label in feature 1."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(n) % 2 == 0
    X = torch.randn(1, n, most, d, generator=generator)
    place = torch.randint(first, (n,), generator=generator)
    X[0, torch.arange(n), place, 0] += mark
    X[0, torch.arange(n), place, 1] += size * (2 * y.float() - 1)
    lengths = torch.randint(first, most + 1, (n,), generator=generator)
    X[0, torch.arange(most) >= lengths[:, None]] = torch.nan
    return X, y, lengths


def test_attention_over_one_token_is_logistic_regression() -> None:
    X, number = correlated(2, 120, 6)
    y = number > number.median()
    strengths = torch.tensor([0.1, 1.0])
    scores = attention.fit(X[:, :100, None], y[:100], None, strengths).scores(X[:, :, None])
    for model in range(2):
        Z = X[model].double().numpy()
        scaler = StandardScaler().fit(Z[:100])
        for place, C in enumerate(strengths.tolist()):
            reference = LogisticRegression(C=C, tol=1e-9, max_iter=10_000).fit(scaler.transform(Z[:100]), y[:100])
            expected = reference.decision_function(scaler.transform(Z))
            np.testing.assert_allclose(scores[model, place, 0], expected, atol=2e-3)


def test_attention_over_many_tokens_is_the_minimum_that_scipy_finds() -> None:
    """The objective of the module's description, written again in numpy for samples of unlike lengths."""
    d = 3
    X, y, lengths = marked(80, 5, d, first=2, mark=3, size=1)
    samples = [tokens[:length].double().numpy() for tokens, length in zip(X[0], lengths, strict=True)]
    tokens = np.concatenate(samples)
    samples = [(sample - tokens.mean(0)) / tokens.std(0) for sample in samples]
    signs = np.where(y, 1, -1)

    def scores(parameters: Any) -> Any:
        query, value, bias = parameters[:d], parameters[d : 2 * d], parameters[-1]
        weights = [np.exp(sample @ query) for sample in samples]
        return np.array([w @ (z @ value) / w.sum() + bias for w, z in zip(weights, samples, strict=True)])

    strengths = torch.tensor([0.1, 1.0])
    found = attention.fit(X, y, None, strengths).scores(X)
    for place, C in enumerate(strengths.tolist()):

        def objective(parameters: Any, C: float = C) -> Any:
            return (parameters[:-1] ** 2).sum() / 2 + C * np.log1p(np.exp(-signs * scores(parameters))).sum()

        reference = minimize(objective, np.zeros(2 * d + 1), options={"gtol": 1e-7})
        np.testing.assert_allclose(found[0, place, 0], scores(reference.x), atol=5e-3)


def test_attention_probes_do_not_depend_on_those_fitted_with_them() -> None:
    X, y, _ = marked(60, 5, 4, first=2, mark=3, size=1)
    X = torch.cat([X, 3 * X.flip(-1)])
    strengths = torch.tensor([0.01, 0.1, 1.0])
    together = attention.fit(X, y, None, strengths).scores(X)
    for model in range(2):
        for place in range(3):
            alone = attention.fit(X[[model]], y, None, strengths[[place]]).scores(X[[model]])
            torch.testing.assert_close(together[model, place], alone[0, 0])


def test_attention_finds_the_token_that_shows_the_label() -> None:
    """The signal is in one token of many, at a place that varies, marked by another feature: a mean over tokens dilutes it."""
    n, most, d = 240, 12, 16
    X, y, lengths = marked(n, most, d, first=4, mark=6, size=2)
    train, test = slice(None, 160), slice(160, None)
    probes = attention.fit(X[:, train], y[train], None, torch.tensor([0.1, 1.0]))
    attended = roc_auc_score(y[test], probes.scores(X[:, test])[0, 1, 0])
    pooled = X.nanmean(2)
    averaged = logistic.fit(pooled[:, train], y[train], None, torch.tensor([0.1]))
    assert attended > 0.9 > roc_auc_score(y[test], averaged.scores(pooled[:, test])[0, 0, 0])

    weights = probes.attention(X)[0, 1]
    torch.testing.assert_close(weights.sum(-1), torch.ones(n))
    assert (weights[torch.arange(most) >= lengths[:, None]] == 0).all()
    longer = torch.cat([X, torch.full((1, n, 3, d), torch.nan)], dim=2)
    torch.testing.assert_close(probes.scores(longer), probes.scores(X))
