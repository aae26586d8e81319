"""The solver where problems of one batch differ most in how soon they are solved."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from probes.kinds import logistic
from tests.probes.kinds.features import correlated


@pytest.mark.parametrize("d", [1, 60])
def test_several_labellings_of_parts_of_the_rows(d):
    """Each is what scikit-learn finds on its own rows, standardised by all; one has next to nothing to learn."""
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
