"""Probes trained by a script: what a training gives back."""

from typing import Any

import pytest
import torch

import roentgen
from roentgen.linear_probe import SavedProbeError
from tests.probes.conftest import build_run, planted

__all__ = ["build_run", "planted"]  # fixtures: a run whose activations are planted

KEYS = ("layers.1.resid_post", "layers.2.resid_post")


def test_probes_are_trained_and_loaded(build_run: Any, planted: Any) -> None:
    features, correct = planted(KEYS, KEYS[1])
    run = roentgen.Run(build_run(features, correct).path)
    trained = roentgen.probes.train(run, label="correct")
    assert trained.folder == run.path / "probes" / "correct"
    assert trained.probe.card.name == f"{KEYS[1]}@last_prompt"
    assert trained.names == [f"{key}@last_prompt" for key in KEYS]
    assert trained.report.best.estimate.value >= 0.95
    for name, direction in trained.directions.items():
        assert torch.equal(direction, trained[name].direction)
        assert direction.norm() == pytest.approx(1)
    scores = trained.probe.scores(features[KEYS[1]])[:, 0]
    assert scores[torch.tensor(correct)].mean() > scores[~torch.tensor(correct)].mean()
    with pytest.raises(SavedProbeError, match=r"has no probe 'layers.9'; it has layers.1.resid_post@last_prompt"):
        trained["layers.9"]
    assert "auroc" in repr(trained)
    assert str(trained.report.best.estimate) in trained._repr_html_()
