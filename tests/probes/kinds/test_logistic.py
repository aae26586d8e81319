import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from probes.kinds import logistic
from tests.probes.kinds.features import correlated


@pytest.mark.parametrize(("rows", "d"), [(40, 150), (150, 40), (60, 60)])
def test_scores_agree_with_scikit_learn(rows: int, d: int) -> None:
    X, number = correlated(3, rows + 20, d)
    y = number > number.median()
    strengths = torch.tensor([1e-4, 1e-2, 1.0, 30.0])
    probes = logistic.fit(X[:, :rows], y[:rows], None, strengths)
    scores = probes.scores(X)
    assert scores.shape == (3, 4, 1, rows + 20)
    for model in range(3):
        Z = X[model].double().numpy()
        scaler = StandardScaler().fit(Z[:rows])
        for place, C in enumerate(strengths.double().tolist()):
            reference = LogisticRegression(C=C, tol=1e-10, max_iter=50_000, solver="newton-cg")
            reference.fit(scaler.transform(Z[:rows]), y[:rows].numpy())
            expected = reference.decision_function(scaler.transform(Z))
            np.testing.assert_allclose(scores[model, place, 0].numpy(), expected, atol=1e-3)


def test_a_constant_feature_is_harmless() -> None:
    X, number = correlated(1, 50, 8)
    y = number > number.median()
    with_constant = torch.cat([X, torch.full((1, 50, 1), 7.0)], dim=-1)
    strengths = torch.tensor([0.1])
    probes = logistic.fit(with_constant, y, None, strengths)
    assert probes.weight[0, 0, 0, -1] == 0
    torch.testing.assert_close(probes.scores(with_constant), logistic.fit(X, y, None, strengths).scores(X))


def test_nothing_to_learn_leaves_the_intercept() -> None:
    y = torch.tensor([True] * 30 + [False] * 10)
    probes = logistic.fit(torch.ones(1, 40, 3), y, None, torch.tensor([1.0]))
    assert probes.weight.abs().max() == 0
    assert probes.bias.item() == pytest.approx(np.log(3), abs=1e-5)


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one class only: 5 of 5"):
        logistic.fit(torch.randn(1, 5, 2), torch.ones(5, dtype=torch.bool), None, torch.tensor([1.0]))
