import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

import probes
import roentgen
from probes.dataset import ProbeDataset
from probes.errors import OneClassError, ProbeDataError
from roentgen.linear_probe import SavedProbeError, load_probe, read_cards
from roentgen.runs import Run, same_question
from tests.eval_jobs.conftest import take
from tests.probes.conftest import BuildRun, Plant
from tests.probes.test_plots import printed

KEYS = ("embed", "layers.1.resid_post", "layers.3.resid_post", "layers.1.mlp_out", "layers.3.mlp_out")
SIGNAL = "layers.3.resid_post"


@pytest.fixture
def run(build_run: BuildRun, planted: Plant) -> Run:
    return build_run(*planted(KEYS, SIGNAL))


def test_a_planted_direction_is_found_at_its_layer_and_nowhere_else(run: Run) -> None:
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


def test_a_named_session_has_a_folder_of_its_own(run: Run) -> None:
    probes.train(run.path)
    report = probes.train(run.path, session=run.path / "activations" / "session")
    assert report.session == "session"
    assert [folder.name for folder in run.probe_folders()] == ["correct", "correct@session"]
    own, named = (json.loads((folder / "results.json").read_text()) for folder in run.probe_folders())
    assert {**own, "session": "session"} == named


def test_the_folder_holds_the_report_the_picture_and_the_probes(run: Run) -> None:
    report = probes.train(run.path, seed=3)
    folder = run.path / "probes" / "correct"
    assert sorted(path.name for path in folder.iterdir()) == [
        "along_trace.png",
        "auroc_by_layer.png",
        "curves.json",
        "dark",
        "probes.json",
        "probes.safetensors",
        "projection.png",
        "reliability.png",
        "report.html",
        "results.json",
        "scores.png",
    ]
    light, dark = (imread(place / "reliability.png") for place in (folder, folder / "dark"))
    assert light[light[..., 3] > 0.95].min() == 0  # black ink
    assert dark[dark[..., 3] > 0.95].max(1).min() > 0.4  # light ink
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
    assert set(results["against"]) == set(results["baselines"]) - {"prevalence", "shuffled_labels"}
    assert results["against"]["prompt_length"]["verdict"] == "better"
    assert results["forecast"]["accuracy"]["accuracy"] == 0.5
    assert results["forecast"]["brier"]["brier"] == pytest.approx(0.25, abs=0.01)
    assert set(results["best"]["metrics"]) == {"auroc", "auprc", "accuracy", "brier", "ece"}
    assert results["declared"] is None


def test_a_saved_probe_scores_rows_as_documented(run: Run) -> None:
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
    assert probe.card.unit == "log_odds"
    assert (probe.card.data_hash, probe.card.folds) == (report.data_hash, 5)
    assert probe.card.metrics["auroc"]["auroc"] > 0.95
    moved = x + 0.5 * probe.direction
    assert (probe.scores(moved) > probe.scores(x)).all()


def test_a_saved_probe_that_cannot_be_used_is_named(run: Run, tmp_path: Path) -> None:
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


def test_positions_are_candidates_and_a_named_one_is_reported_beside_the_best(run: Run) -> None:
    declared = "layers.1.mlp_out@last"
    report = probes.train(run.path, positions=["last_prompt", "last", "at:0.5"], declared=declared)
    assert len(report.results) == 3 * len(KEYS)
    assert report.declared.names == (declared,)
    assert report.declared.estimate.value < 0.75
    assert (run.path / "probes/correct/heatmap.png").exists()
    with pytest.raises(ProbeDataError, match=r"declared: 'layers.7.x@last' is not a candidate; allowed are embed@last"):
        probes.train(run.path, declared="layers.7.x@last")


def test_each_kind_reads_its_kind_of_label(run: Run) -> None:
    report = probes.train(run.path, kind="lda")
    assert report.best.estimate.value >= 0.95
    assert [folder.name for folder in run.probe_folders()] == ["correct+lda"]
    with pytest.raises(
        ProbeDataError, match=r"kind: 'ridge' does not support 'correct', which is binary; allowed are logistic"
    ):
        probes.train(run.path, kind="ridge")
    with pytest.raises(ProbeDataError, match=r"positions: the kind 'attention' reads tokens, not 'last_prompt'"):
        probes.train(run.path, kind="attention")


def test_labels_of_a_table_and_of_several_sources(run: Run, tmp_path: Path) -> None:
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


def test_columns_that_cannot_be_probed_are_named(run: Run, tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text(
        "\n".join(["problem_id,same,endless", *(f"problem-{i},k,{'inf' if i == 7 else i}" for i in range(80))])
    )
    with pytest.raises(OneClassError, match="all 80 samples have same = k"):
        probes.train(run.path, "same", table=table)
    with pytest.raises(ProbeDataError, match="label: 'endless' must be a finite number; problem-7 has inf"):
        probes.train(run.path, "endless", table=table)


def test_a_device_that_is_not_here_is_named(run: Run) -> None:
    with pytest.raises(ProbeDataError, match="device: 'tpu' is not available; allowed are cpu"):
        probes.train(run.path, device="tpu")


def test_what_is_only_noise_says_so(build_run: BuildRun, planted: Plant) -> None:
    report = probes.train(build_run(*planted(KEYS, None)).path)
    assert any("reaches 0.5" in note for note in report.notes())


def test_the_same_seed_gives_the_same_report(run: Run) -> None:
    first = probes.train(run.path, seed=1)
    assert probes.train(run.path, seed=1) == first
    assert probes.train(run.path, seed=2) != first


def test_a_length_that_tells_the_label_is_noted(build_run: BuildRun, planted: Plant) -> None:
    features, correct = planted(KEYS, None)
    report = probes.train(build_run(features, correct, prompt_tokens=[30 + 5 * c for c in correct]).path)
    assert report.baselines["prompt_length"].value == 1.0
    assert any(note.startswith("Prompt length alone does about as well") for note in report.notes())


def test_other_positions_and_labels_have_their_own_results(build_run: BuildRun, planted: Plant) -> None:
    features, correct = planted(KEYS, SIGNAL)
    length = {i: {"finish_reason": "length"} for i in range(80) if correct[i]}
    run = build_run(features, [not c for c in correct], changes=length)
    report = probes.train(run.path, "truncated", "mean_generated")
    assert report.best.estimate.value >= 0.95
    assert (run.path / "probes/truncated/results.json").exists()
    assert json.loads((run.path / "probes/truncated/results.json").read_text())["positions"] == "mean_generated"


def test_one_class_leaves_no_results(build_run: BuildRun, planted: Plant) -> None:
    features, _ = planted(KEYS, None, n=8)
    run = build_run(features, [False] * 8)
    with pytest.raises(OneClassError, match="all 8 samples have correct = False"):
        probes.train(run.path)
    assert not (run.path / "probes").exists()


@pytest.fixture
def fingerprints() -> Any:
    """Return a function that makes rows which show only which of some groups a sample is of, and labels drawn per group."""

    def make(groups: list[int]) -> tuple[dict[str, torch.Tensor], list[bool]]:
        generator = torch.Generator().manual_seed(1)
        marks, noise = (
            torch.randn(max(groups) + 1, 32, generator=generator),
            torch.randn(len(groups), 32, generator=generator),
        )
        return {"layers.1.resid_post": marks[groups] + 0.1 * noise}, [group % 2 == 0 for group in groups]

    return make


def test_a_fingerprint_of_the_question_is_at_chance(build_run: BuildRun, fingerprints: Any) -> None:
    """30 questions under three ids each: a probe that knows the question by heart learns nothing of others."""
    asked = [i % 30 for i in range(90)]
    posed = {i: {"question": f"Tom has {q} apples and {q * q} pears."} for i, q in enumerate(asked)}
    run = build_run(*fingerprints(asked), changes=posed)
    report = probes.train(run.path)
    assert (report.n_problems, report.n_groups) == (30, 30)
    assert report.best.estimate.low <= 0.5 <= report.best.estimate.high
    data = ProbeDataset.open(run.path)
    assert all(len(set(data.groups[[i, i + 30, i + 60]])) == 1 for i in range(30))


def test_a_fingerprint_of_the_template_is_at_chance(build_run: BuildRun, fingerprints: Any) -> None:
    """GSM-Symbolic's templates, as an old record has them: no template is named, only the questions are there."""
    problems = take("gsm-symbolic", 120)
    names = sorted({str(problem.template) for problem in problems})
    templates = [names.index(str(problem.template)) for problem in problems]
    posed = {i: {"question": problem.question} for i, problem in enumerate(problems)}
    features, correct = fingerprints(templates)
    run = build_run(features, correct, problems=[p.problem_id for p in problems], changes=posed)
    report = probes.train(run.path)
    assert (report.n_problems, report.n_groups) == (120, len(names))
    assert report.best.estimate.low <= 0.5 <= report.best.estimate.high
    assert f"120 problems ({len(names)} groups" in printed(report)


def test_the_same_prompt_in_a_session_is_one_question(build_run: BuildRun, fingerprints: Any) -> None:
    """Without ids that say so; the texts of this session are all alike, so that nothing is linked until one is not."""
    run = build_run(*fingerprints([i % 20 for i in range(40)]))
    data = ProbeDataset.open(run.path / "activations" / "session", "side", table=_sides(run.path))
    assert data.n_problems == 40
    examples = [replace(e, question=f"Q{i % 20}") for i, e in enumerate(data.examples)]
    assert len(set(same_question([example.posed for example in examples]))) == 20


def test_the_first_layer_is_the_first_that_is_computed(build_run: BuildRun, planted: Plant) -> None:
    keys = ("final_norm", "layers.3.resid_post", "layers.0.resid_post", "layers.0.resid_pre")
    run = build_run(*planted(keys, "final_norm"))
    report = probes.train(run.path)
    found = {result.key: result.estimate for result in report.results}
    assert report.baselines["first_layer"] == found["layers.0.resid_pre"]
    assert report.against["first_layer"].low > 0
    assert [result.key for result in report.results] == [
        "layers.0.resid_pre", "layers.0.resid_post", "layers.3.resid_post", "final_norm"
    ]  # fmt: skip


def test_a_probe_is_not_compared_with_itself(build_run: BuildRun, planted: Plant) -> None:
    report = probes.train(build_run(*planted(("embed",), "embed")).path)
    assert "first_layer" not in report.against
    assert report.notes() == []


def test_answers_that_were_not_read_are_controlled_for(build_run: BuildRun, planted: Plant) -> None:
    """The probe reads whether an answer was found: among those where one was, nothing is left."""
    features, unread = planted(KEYS, SIGNAL, n=120)
    correct = [not u and i % 4 != 1 for i, u in enumerate(unread)]
    found = {i: {"answers": {"answer": None if u else "7"}} for i, u in enumerate(unread)}
    run = build_run(features, correct, changes=found)
    config = run.config.model_copy(update={"settings": {"extractor": "answer"}})
    (run.path / "config.json").write_text(config.model_dump_json())
    report = probes.train(run.path)
    assert report.best.estimate.low > 0.6
    assert report.without["unread"].left_out == 60
    assert report.without["unread"].estimate.low <= 0.5
    assert any(note.startswith("On samples with an extracted answer") for note in report.notes())


def test_a_contrast_without_contrasts_says_what_it_needs(build_run: BuildRun, planted: Plant) -> None:
    run = build_run(*planted(KEYS, SIGNAL, n=24))
    for attempt in (
        lambda: probes.train(run.path, kind="contrast"),
        lambda: probes.compare(run.path, run.path, kind="contrast"),
    ):
        with pytest.raises(
            OneClassError, match=r"problems with attempts of both classes.*sample each problem several times"
        ):
            attempt()


def test_few_contrasts_are_dealt_to_every_fold(build_run: BuildRun, planted: Plant) -> None:
    """Three problems of twelve have attempts of both classes: each fold trains on one at least."""
    features, _ = planted(KEYS, None, n=48)
    correct = [i % 2 == 0 if i < 12 else i // 4 % 2 == 0 for i in range(48)]
    run = build_run(features, correct, problems=[f"p{i // 4}" for i in range(48)])
    report = probes.train(run.path, kind="contrast")
    assert report.n_folds == 3
    assert load_probe(run.path / "probes/correct+contrast", "embed@last_prompt").card.unit == "score"


def test_what_cannot_be_is_said_before_anything_is_fitted(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ProbeDataError, match=r"seed: -1 is out of range; allowed are 0 to"):
        probes.train(run.path, seed=-1)
    with pytest.raises(ProbeDataError, match=r"output: .* cannot be written: .*config.json is not a folder"):
        probes.train(run.path, output=run.path / "config.json" / "x")
    with pytest.raises(ProbeDataError, match="the kind 'logistic' reads one row per sample, not 'tokens'"):
        probes.compare(run.path, run.path, positions="tokens")
    with pytest.raises(ProbeDataError, match="'attention' has no direction"):
        probes.compare(run.path, run.path, kind="attention")


def test_rows_that_are_not_finite_are_no_padding(build_run: BuildRun, planted: Plant) -> None:
    features, correct = planted(KEYS[1:2], None, n=8)
    features[KEYS[1]][3] = torch.nan
    run = build_run(features, correct)
    with pytest.raises(ProbeDataError, match="non-finite values in 1 of 8 samples"):
        probes.train(run.path, kind="attention", positions="tokens")


def test_probes_saved_before_there_was_a_unit_have_mere_scores(run: Run) -> None:
    probes.train(run.path)
    cards = run.path / "probes/correct/probes.json"
    old = {name: {k: v for k, v in card.items() if k != "unit"} for name, card in json.loads(cards.read_text()).items()}
    cards.write_text(json.dumps(old))
    assert {card.unit for card in read_cards(cards.parent).values()} == {"score"}


def _sides(folder: Path) -> Any:
    table = folder / "sides.csv"
    table.write_text("\n".join(["problem_id,side", *(f"problem-{i},{i % 2}" for i in range(40))]))
    return table
