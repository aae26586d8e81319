"""What the page draws of a training, computed again from the scores that were kept."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import probes
from probes.report import ProbeReport
from roentgen.linear_probe import load_probe
from roentgen.runs import Run
from tests.probes.conftest import N_PROMPT, N_ROWS, BuildRun, Plant

Trained = tuple[Run, ProbeReport, Path, dict[str, Any]]
KEYS = ("layers.0.resid_post", "layers.3.resid_post")


@pytest.fixture
def trained(build_run: BuildRun, planted: Plant) -> Trained:
    features, correct = planted(KEYS, KEYS[1], strength=2.0)
    run = build_run(features, correct)
    report = probes.train(run.path)
    folder = run.path / "probes" / "correct"
    return run, report, folder, json.loads((folder / "curves.json").read_text())


def test_scores_are_out_of_fold_and_give_the_reports_metrics(trained: Trained) -> None:
    run, report, folder, curves = trained
    scores = np.array([curves["samples"][sample.sample_id] for sample in run.read_samples()])
    y = np.array([sample.correct for sample in run.read_samples()])
    assert curves["unit"] == "log_odds"
    assert ((scores > 0) == y).mean() == pytest.approx(report.best.metrics["accuracy"].value)
    assert np.mean((1 / (1 + np.exp(-scores)) - y) ** 2) == pytest.approx(report.best.metrics["brier"].value, rel=1e-4)
    # Probes fitted on all samples say something else of the same rows.
    probe = load_probe(folder, f"{KEYS[1]}@last_prompt")
    rows = np.stack([item.values[0].numpy() for item in run.activations(KEYS[1], "last_prompt")])
    assert not np.allclose(probe.scores(probe.mean.new_tensor(rows))[:, 0].numpy(), scores, atol=1e-3)


def test_curves_are_those_of_the_scores(trained: Trained) -> None:
    run, _, _, curves = trained
    names = [sample.sample_id for sample in run.read_samples()]
    y = {sample.sample_id: sample.correct for sample in run.read_samples()}
    scores = curves["samples"]
    confident = sorted(names, key=lambda name: -abs(scores[name]))
    wrong = [name for name in confident if (scores[name] > 0) != y[name]]
    assert 0 < len(wrong) < len(names) / 2
    assert [error["sample_id"] for error in curves["errors"]] == wrong
    for point in curves["risk_coverage"]:
        kept = confident[: round(point["coverage"] * len(names))]
        assert point["risk"] == pytest.approx(len(set(kept) & set(wrong)) / len(kept))
        assert point["low"] <= point["risk"] + 1e-9
        assert point["risk"] <= point["high"] + 1e-9
    assert curves["risk_coverage"][-1]["coverage"] == 1
    assert sum(bin["n"] for bin in curves["reliability"]) == len(names)
    for part in curves["reliability"]:
        assert abs(part["observed"] * part["n"] - round(part["observed"] * part["n"])) < 1e-9
    said = sum(part["predicted"] * part["n"] for part in curves["reliability"])
    assert said == pytest.approx(sum(1 / (1 + np.exp(-score)) for score in scores.values()), rel=1e-4)
    for part in curves["classes"]:
        assert sorted(part["values"]) == sorted(scores[name] for name in names if str(y[name]) == part["name"])


def test_traces_go_from_the_end_of_the_prompt_to_the_last_row(trained: Trained) -> None:
    _, _, _, curves = trained
    assert {trace["name"]: trace["n"] for trace in curves["traces"]} == {"True": 40, "False": 40}
    for trace in curves["traces"]:
        assert trace["x"][0] == 0
        assert trace["x"][-1] == 1
        assert len(trace["x"]) == len(trace["mean"]) == len(trace["low"]) == len(trace["high"])
        assert all(
            low <= mean <= high for low, mean, high in zip(trace["low"], trace["mean"], trace["high"], strict=True)
        )
        # Rows lie 100 apart along every feature (`conftest`), so that scores go along the trace in a straight line.
        steps = np.diff(np.interp(np.linspace(0, 1, N_ROWS - N_PROMPT + 1), trace["x"], trace["mean"]))
        assert steps == pytest.approx(np.full(len(steps), steps.mean()), rel=0.02)
