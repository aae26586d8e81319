"""The solver on batches whose problems converge at very different rates."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from probes.kinds import logistic, multinomial
from tests.probes.kinds.features import correlated


@pytest.mark.parametrize("d", [1, 60])
def test_several_labellings_of_parts_of_the_rows(d: int) -> None:
    """Each is what scikit-learn finds on its own rows, standardized by all; one has next to nothing to learn."""
    X, number = correlated(20, 120, max(d, 2))
    X = X[..., :d]
    y = torch.stack([number > number.median(), number > number.quantile(0.8), torch.arange(120) % 2 == 0])
    trains = torch.stack([torch.arange(120) % 3 != 0, torch.arange(120) < 90, torch.ones(120, dtype=torch.bool)])
    strengths = torch.tensor([1e-4, 1e-2, 1.0])
    scores = logistic.fit_together(X, y, trains, strengths).scores(X).unflatten(1, (3, 3))
    for model in (0, 19):
        Z = StandardScaler().fit_transform(X[model].double().numpy())
        for case in range(3):
            own = trains[case].numpy()
            for place, C in enumerate(strengths.double().tolist()):
                reference = LogisticRegression(C=C, tol=1e-10, max_iter=50_000, solver="newton-cg")
                expected = reference.fit(Z[own], y[case].numpy()[own]).decision_function(Z)
                np.testing.assert_allclose(scores[model, case, place, 0].numpy(), expected, atol=1e-3)


@pytest.mark.parametrize("feature", ["constant", "shared by a class", "large"])
def test_three_classes_where_there_is_little_or_nothing_to_read(feature: str) -> None:
    """A shift of all classes' intercepts changes nothing: rounding is no reason to go there. In this order it was one."""
    y = torch.tensor([1, 0, 2, 0, 2, 1])
    X = torch.full((1, 6, 1), 2.0)
    if feature == "shared by a class":
        X[0, y == 1] += 1
    if feature == "large":
        X = X * 1e4 * torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    strengths = torch.tensor([1e-4, 1e-3, 1e-2, 1e-1], dtype=torch.float64)
    probes = multinomial.fit(X, y, None, strengths)
    Z = StandardScaler().fit_transform(X[0].double().numpy())
    for place, C in enumerate(strengths.tolist()):
        reference = LogisticRegression(C=C, tol=1e-10, max_iter=10_000, solver="newton-cg").fit(Z, y.numpy())
        np.testing.assert_allclose(probes.scores(X)[0, place].T, reference.decision_function(Z), atol=1e-3)


def test_a_feature_that_is_constant_but_for_rounding_scores_as_scikit_learn_does() -> None:
    """The mean of several 0.1 is not quite 0.1: their deviation is no scale for a row that was not among them."""
    X = torch.cat([torch.full((7, 1), 0.1, dtype=torch.float64), torch.arange(7.0)[:, None].double()], 1)
    y = torch.arange(7) % 2 == 0
    new = torch.tensor([[0.3, 2.0]], dtype=torch.float64)
    scaler = StandardScaler().fit(X.numpy())
    reference = LogisticRegression(C=0.1, tol=1e-10).fit(scaler.transform(X.numpy()), y.numpy())
    found = logistic.fit(X[None], y, None, torch.tensor([0.1], dtype=torch.float64)).scores(new[None])
    np.testing.assert_allclose(found[0, 0, 0], reference.decision_function(scaler.transform(new.numpy())), atol=1e-3)
