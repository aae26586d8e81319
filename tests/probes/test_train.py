import json

import numpy as np
import pytest
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

import probes
import roentgen
from probes.dataset import OneClassError, ProbeDataset

KEYS = ("embed", "layers.1.resid_post", "layers.3.resid_post", "layers.1.mlp_out", "layers.3.mlp_out")
SIGNAL = "layers.3.resid_post"


@pytest.fixture
def run(build_run, planted):
    return build_run(*planted(KEYS, SIGNAL))


def test_a_planted_direction_is_found_at_its_layer_and_nowhere_else(run):
    report = probes.train(run.path)
    found = {result.key: result.estimate for result in report.keys}
    assert set(found) == set(KEYS)
    assert found[SIGNAL].auroc >= 0.95
    for key in set(KEYS) - {SIGNAL}:
        assert found[key].low <= 0.5 <= found[key].high, key
    assert report.best.estimate.auroc >= 0.95
    assert set(report.best.keys) == {SIGNAL}
    assert report.baselines["prompt_length"].auroc == 0.5
    chance = report.baselines["shuffled_labels"]
    assert chance.low <= 0.5 <= chance.high
    assert report.notes() == []


def test_a_named_session_has_a_folder_of_its_own(run):
    probes.train(run.path)
    report = probes.train(run.path, session=run.path / "activations" / "session")
    assert report.session == "session"
    assert [folder.name for folder in run.probe_folders()] == ["correct", "correct@session"]
    own, named = (json.loads((folder / "results.json").read_text()) for folder in run.probe_folders())
    assert {**own, "session": "session"} == named


def test_the_folder_holds_the_report_the_picture_and_the_probes(run):
    report = probes.train(run.path, seed=3)
    folder = run.path / "probes" / "correct"
    assert sorted(path.name for path in folder.iterdir()) == [
        "auroc_by_layer.png",
        "probes.safetensors",
        "results.json",
    ]
    assert run.probe_folders() == [folder]

    results = json.loads((folder / "results.json").read_text())
    assert results == json.loads(json.dumps(report.to_json()))
    expected = {
        "label": "correct",
        "positions": "last_prompt",
        "seed": 3,
        "n_samples": 80,
        "n_problems": 80,
        "prevalence": 0.5,
        "roentgen": roentgen.__version__,
    }
    assert {name: results[name] for name in expected} == expected
    embed = next(key for key in results["keys"] if key["key"] == "embed")
    assert set(embed) == {"key", "hook_point", "layer", "auroc", "low", "high", "C"}
    assert embed["layer"] is None
    assert len(results["best"]["keys"]) == results["n_folds"] == 5
    assert set(results["baselines"]) == {"prompt_length", "response_length", "shuffled_labels"}


def test_a_saved_probe_scores_rows_as_documented(run):
    probes.train(run.path)
    saved = load_file(run.path / "probes/correct/probes.safetensors")
    assert set(saved) == {f"{key}.{part}" for key in KEYS for part in ("weight", "bias", "mean", "scale")}
    data = ProbeDataset.open(run.path)
    x = data.features(SIGNAL)
    weight, bias, mean, scale = (saved[f"{SIGNAL}.{part}"] for part in ("weight", "bias", "mean", "scale"))
    scores = (x - mean) / scale @ weight + bias
    assert roc_auc_score(data.y, scores) > 0.95
    assert np.mean((scores > 0).numpy() == data.y) > 0.9  # log-odds: the threshold is 0


def test_the_same_seed_gives_the_same_report(run):
    first = probes.train(run.path, seed=1)
    assert probes.train(run.path, seed=1) == first
    assert probes.train(run.path, seed=2) != first


def test_a_length_that_tells_the_label_is_noted(build_run, planted):
    features, correct = planted(KEYS, None)
    report = probes.train(build_run(features, correct, prompt_tokens=[30 + 5 * c for c in correct]).path)
    assert report.baselines["prompt_length"].auroc == 1.0
    assert any(note.startswith("Prompt length alone does about as well") for note in report.notes())


def test_other_positions_and_labels_have_their_own_results(build_run, planted):
    features, correct = planted(KEYS, SIGNAL)
    length = {i: {"finish_reason": "length"} for i in range(80) if correct[i]}
    run = build_run(features, [not c for c in correct], changes=length)
    report = probes.train(run.path, "truncated", "mean_generated")
    assert report.best.estimate.auroc >= 0.95
    assert (run.path / "probes/truncated/results.json").exists()
    assert json.loads((run.path / "probes/truncated/results.json").read_text())["positions"] == "mean_generated"


def test_one_class_leaves_no_results(build_run, planted):
    features, _ = planted(KEYS, None, n=8)
    run = build_run(features, [False] * 8)
    with pytest.raises(OneClassError, match="all 8 samples have correct = False"):
        probes.train(run.path)
    assert not (run.path / "probes").exists()
