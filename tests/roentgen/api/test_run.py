"""A run is a table, a number with its interval, and rows; probes are trained on it, read and steered with."""

from pathlib import Path
from typing import Any

import pytest
import torch

import roentgen
from probes.errors import ProbeDataError
from roentgen.linear_probe import SavedProbeError
from tests.eval_jobs.test_outputs import make_run

KEYS = ("layers.1.resid_post", "layers.2.resid_post")


def test_samples_and_accuracy(tmp_path: Path) -> None:
    files = make_run(tmp_path)
    run = roentgen.Run(files.path)
    assert list(run.samples["sample_id"]) == [f"gsm8k_000{number}" for number in range(1, 6)]
    answered = run.samples[run.samples["error"].isna()]
    assert run.accuracy.n == len(answered)
    assert run.accuracy.value == pytest.approx(answered["correct"].mean())
    assert run.accuracy.low is not None
    assert run.accuracy.high is not None
    assert run.accuracy.low < run.accuracy.value < run.accuracy.high
    assert run.report() == files.path / "report.html"
    page = run._repr_html_()
    assert "gsm8k_0001" in page
    assert "<b>poisoned" not in page
    assert f"{run.accuracy.n} samples, accuracy {run.accuracy.value:.3f} [" in repr(run)


def test_rows_are_beside_their_problems(build_run: Any, planted: Any) -> None:
    features, correct = planted(KEYS, None, n=6)
    run = roentgen.Run(build_run(features, correct).path)
    rows = run.activations(KEYS[1], positions="last_prompt")
    order = [int(name.removeprefix("problem-")) for name in rows.rollouts["problem_id"]]
    assert sorted(order) == list(range(6))
    assert torch.equal(rows.stack(), features[KEYS[1]][order])
    assert run.keys() == list(KEYS)


def test_several_sessions_are_named(build_run: Any, planted: Any) -> None:
    run = roentgen.Run(build_run(*planted(KEYS, None, n=6), sessions=("one", "two")).path)
    with pytest.raises(ProbeDataError, match=r"session: .* several sessions, .*/one, .*/two; open each by itself"):
        run.activations(KEYS[0])


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
