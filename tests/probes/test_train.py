import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

import probes
import roentgen
from probes.dataset import ProbeDataset
from probes.errors import OneClassError, ProbeDataError
from roentgen.saved_probes import SavedProbeError, load_probe, read_cards

KEYS = ("embed", "layers.1.resid_post", "layers.3.resid_post", "layers.1.mlp_out", "layers.3.mlp_out")
SIGNAL = "layers.3.resid_post"


@pytest.fixture
def run(build_run, planted):
    return build_run(*planted(KEYS, SIGNAL))


def test_a_planted_direction_is_found_at_its_layer_and_nowhere_else(run):
    report = probes.train(run.path)
    found = {result.key: result.estimate for result in report.results}
    assert set(found) == set(KEYS)
    assert found[SIGNAL].value >= 0.95
    for key in set(KEYS) - {SIGNAL}:
        assert found[key].low <= 0.5 <= found[key].high, key
    assert report.best.estimate.value >= 0.95
    assert set(report.best.names) == {f"{SIGNAL}@last_prompt"}
    assert report.baselines["prompt_length"].value == 0.5
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
        "along_trace.png",
        "auroc_by_layer.png",
        "dark",
        "probes.json",
        "probes.safetensors",
        "projection.png",
        "reliability.png",
        "report.html",
        "results.json",
        "scores.png",
    ]
    assert {path.name for path in (folder / "dark").iterdir()} == {path.name for path in folder.glob("*.png")}
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
    assert set(embed) == {"key", "hook_point", "layer", "positions", "auroc", "low", "high", "strength"}
    assert embed["layer"] is None
    assert len(results["best"]["keys"]) == results["n_folds"] == 5
    assert set(results["baselines"]) == {
        "prevalence", "prompt_length", "response_length", "mean_logprob", "question_words", "shuffled_labels",
        "random_direction", "first_layer",
    }  # fmt: skip
    assert set(results["best"]["metrics"]) == {"auroc", "auprc", "accuracy", "brier", "ece"}
    assert results["declared"] is None


def test_a_saved_probe_scores_rows_as_documented(run):
    report = probes.train(run.path)
    folder = run.path / "probes/correct"
    saved = load_file(folder / "probes.safetensors")
    names = [f"{key}@last_prompt" for key in KEYS]
    assert set(saved) == {f"{name}.{part}" for name in names for part in ("weight", "bias", "mean", "scale")}
    data = ProbeDataset.open(run.path)
    x = data.features(SIGNAL)
    weight, bias, mean, scale = (saved[f"{SIGNAL}@last_prompt.{part}"] for part in ("weight", "bias", "mean", "scale"))
    scores = (x - mean) / scale @ weight[0] + bias
    assert roc_auc_score(data.target.values, scores) > 0.95
    assert np.mean((scores > 0).numpy() == data.target.values) > 0.9  # log-odds: the threshold is 0

    probe = load_probe(folder, f"{SIGNAL}@last_prompt")
    assert torch.allclose(probe.scores(x)[:, 0], scores, atol=1e-5)
    assert (probe.card.layer, probe.card.label, probe.card.positions) == (3, "correct", "last_prompt")
    assert (probe.card.data_hash, probe.card.folds) == (report.data_hash, 5)
    assert probe.card.metrics["auroc"]["auroc"] > 0.95
    moved = x + 0.5 * probe.direction
    assert (probe.scores(moved) > probe.scores(x)).all()


def test_a_saved_probe_that_cannot_be_used_is_named(run, tmp_path):
    probes.train(run.path)
    folder = run.path / "probes/correct"
    with pytest.raises(SavedProbeError, match=r"no probe 'layers.9.x@last'; it has embed@last_prompt"):
        load_probe(folder, "layers.9.x@last")
    with pytest.raises(SavedProbeError, match="holds no probes"):
        load_probe(tmp_path / "nowhere", "embed@last_prompt")
    (folder / "probes.safetensors").write_bytes(b"torn")
    with pytest.raises(SavedProbeError, match=r"probes.safetensors is damaged"):
        load_probe(folder, "embed@last_prompt")
    (folder / "probes.json").write_text("[1]")
    with pytest.raises(SavedProbeError, match=r"probes.json is damaged"):
        read_cards(folder)


def test_positions_are_candidates_and_a_named_one_is_reported_beside_the_best(run):
    declared = "layers.1.mlp_out@last"
    report = probes.train(run.path, positions=["last_prompt", "last", "at:0.5"], declared=declared)
    assert len(report.results) == 3 * len(KEYS)
    assert report.declared.names == (declared,)
    assert report.declared.estimate.value < 0.75
    assert (run.path / "probes/correct/heatmap.png").exists()
    with pytest.raises(ProbeDataError, match=r"declared: 'layers.7.x@last' is not a candidate; allowed are embed@last"):
        probes.train(run.path, declared="layers.7.x@last")


def test_each_kind_reads_its_kind_of_label(run):
    report = probes.train(run.path, kind="lda")
    assert report.best.estimate.value >= 0.95
    assert [folder.name for folder in run.probe_folders()] == ["correct+lda"]
    with pytest.raises(
        ProbeDataError, match=r"kind: 'ridge' does not read 'correct', which is binary; allowed are logistic"
    ):
        probes.train(run.path, kind="ridge")
    with pytest.raises(ProbeDataError, match=r"positions: the kind 'attention' reads tokens, not 'last_prompt'"):
        probes.train(run.path, kind="attention")


def test_labels_of_a_table_and_of_several_sources(run, tmp_path):
    table = tmp_path / "labels.csv"
    rows = [f"problem-{i},{i % 2},{'abc'[i % 3]},{i / 7}" for i in range(80)]
    table.write_text("\n".join(["problem_id,odd,letter,number", *rows]))
    report = probes.train(run.path, "odd", table=table)
    assert report.best.estimate.value >= 0.95  # odd problems are the wrong ones
    assert probes.train(run.path, "letter", table=table).classes == ("a", "b", "c")
    assert probes.train(run.path, "number", table=table).metric == "r2"
    with pytest.raises(ProbeDataError, match=r"label: 'height' .* letter, number, odd"):
        probes.train(run.path, "height", table=table)
    session = run.path / "activations" / "session"
    data = ProbeDataset.open([run.path, session], "source")
    assert data.n_problems == 80  # a problem is one, wherever it was attempted
    assert data.origin.tolist() == [0] * 80 + [1] * 80


def test_columns_that_cannot_be_probed_are_named(run, tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text(
        "\n".join(["problem_id,same,endless", *(f"problem-{i},k,{'inf' if i == 7 else i}" for i in range(80))])
    )
    with pytest.raises(OneClassError, match="all 80 samples have same = k"):
        probes.train(run.path, "same", table=table)
    with pytest.raises(ProbeDataError, match="label: 'endless' has to be a finite number; problem-7 has inf"):
        probes.train(run.path, "endless", table=table)


def test_a_device_that_is_not_here_is_named(run):
    with pytest.raises(ProbeDataError, match="device: 'tpu' is not here; allowed are cpu"):
        probes.train(run.path, device="tpu")


def test_what_is_only_noise_says_so(build_run, planted):
    report = probes.train(build_run(*planted(KEYS, None)).path)
    assert any("reaches 0.5" in note for note in report.notes())


def test_the_same_seed_gives_the_same_report(run):
    first = probes.train(run.path, seed=1)
    assert probes.train(run.path, seed=1) == first
    assert probes.train(run.path, seed=2) != first


def test_a_length_that_tells_the_label_is_noted(build_run, planted):
    features, correct = planted(KEYS, None)
    report = probes.train(build_run(features, correct, prompt_tokens=[30 + 5 * c for c in correct]).path)
    assert report.baselines["prompt_length"].value == 1.0
    assert any(note.startswith("Prompt length alone does about as well") for note in report.notes())


def test_other_positions_and_labels_have_their_own_results(build_run, planted):
    features, correct = planted(KEYS, SIGNAL)
    length = {i: {"finish_reason": "length"} for i in range(80) if correct[i]}
    run = build_run(features, [not c for c in correct], changes=length)
    report = probes.train(run.path, "truncated", "mean_generated")
    assert report.best.estimate.value >= 0.95
    assert (run.path / "probes/truncated/results.json").exists()
    assert json.loads((run.path / "probes/truncated/results.json").read_text())["positions"] == "mean_generated"


def test_one_class_leaves_no_results(build_run, planted):
    features, _ = planted(KEYS, None, n=8)
    run = build_run(features, [False] * 8)
    with pytest.raises(OneClassError, match="all 8 samples have correct = False"):
        probes.train(run.path)
    assert not (run.path / "probes").exists()
