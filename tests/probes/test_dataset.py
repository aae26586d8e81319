import shutil
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from probes.baselines import covariates
from probes.dataset import ProbeDataset
from probes.errors import OneClassError, ProbeDataError
from roentgen.runs import Run, RunError
from tests.probes.conftest import BuildRun, Plant

KEYS = ("layers.2.resid_post", "layers.10.resid_post", "layers.2.mlp_out", "embed")


def test_features_are_the_rows_of_the_asked_position_in_the_order_of_examples(
    build_run: BuildRun, planted: Plant
) -> None:
    features, correct = planted(KEYS, None, n=10)
    run = build_run(features, correct, sessions=("one", "two"))
    data = ProbeDataset.open(run.path)

    order = [int(example.problem.removeprefix("problem-")) for example in data.examples]
    assert sorted(order) == list(range(10))
    assert data.target.values.tolist() == [correct[number] for number in order]
    features = {key: values[order] for key, values in features.items()}
    for key in KEYS:
        assert torch.equal(data.features(key), features[key])
    assert torch.allclose(data.features(KEYS[0], "at:0"), features[KEYS[0]], atol=1e-4)
    assert torch.allclose(data.features(KEYS[0], "at:0.5"), features[KEYS[0]] + 100, atol=1e-4)
    assert torch.allclose(data.features(KEYS[0], "at:1"), features[KEYS[0]] + 200, atol=1e-4)
    tokens = data.features(KEYS[0], "tokens")
    assert tokens.shape == (10, 5, 24)
    assert torch.allclose(tokens[:, 2], features[KEYS[0]], atol=1e-4)
    assert torch.allclose(data.features(KEYS[0], "last"), features[KEYS[0]] + 200, atol=1e-4)
    assert torch.allclose(data.features(KEYS[0], "mean_prompt"), features[KEYS[0]] - 100, atol=1e-4)
    assert torch.allclose(data.features(KEYS[0], "mean_generated"), features[KEYS[0]] + 150, atol=1e-4)


def test_labels_groups_and_covariates_follow_the_record(build_run: BuildRun, planted: Plant) -> None:
    features, correct = planted(KEYS, None, n=6)
    run = build_run(
        features,
        correct,
        problems=["a", "b", "b", "c", "c", "a"],
        prompt_tokens=[7, 8, 8, 9, 9, 7],
        changes={1: {"finish_reason": "length"}, 3: {"finish_reason": "length"}},
    )
    data = ProbeDataset.open(run.path)
    assert data.target.values.tolist() == correct
    assert data.groups.tolist() == [0, 1, 1, 2, 2, 0]
    assert data.n_problems == 3
    found = covariates(data)
    assert found["prompt_length"].flatten().tolist() == [7, 8, 8, 9, 9, 7]
    assert found["response_length"].flatten().tolist() == [3] * 6
    assert ProbeDataset.open(run.path, "truncated").target.values.tolist() == [False, True, False, True, False, False]


def test_hook_points_are_in_order_of_layer(build_run: BuildRun, planted: Plant) -> None:
    run = build_run(*planted(("layers.10.resid_post", "layers.2.resid_post", "embed"), None, n=6))
    assert ProbeDataset.open(run.path).hook_points() == {
        "embed": ["embed"],
        "resid_post": ["layers.2.resid_post", "layers.10.resid_post"],
    }


def test_failed_samples_and_samples_without_rollout_are_left_out_and_counted(
    build_run: BuildRun, planted: Plant
) -> None:
    features, correct = planted(KEYS, None, n=8)
    run = build_run(features, correct, changes={0: {"error": "timed out"}, 3: {"rollouts": []}})
    data = ProbeDataset.open(run.path)
    assert data.left_out == 2
    assert torch.equal(data.features(KEYS[0]), features[KEYS[0]][[1, 2, 4, 5, 6, 7]])


def test_the_first_turn_counts(build_run: BuildRun, planted: Plant) -> None:
    features, correct = planted(KEYS, None, n=6)
    run = build_run(features, correct)
    samples = run.read_samples()
    later = samples[1].rollouts[0].model_copy(update={"turn": 1})
    two_turns = samples[0].model_copy(update={"rollouts": [later, *samples[0].rollouts]})
    run.record_path.write_text("".join(s.model_dump_json() + "\n" for s in [two_turns, *samples[1:]]))
    assert torch.equal(ProbeDataset.open(run.path).features(KEYS[0]), features[KEYS[0]])


def test_a_moved_run_is_read_from_where_it_is(build_run: BuildRun, planted: Plant, tmp_path: Path) -> None:
    features, correct = planted(KEYS, None, n=6)
    run = build_run(features, correct)
    moved = tmp_path / "elsewhere" / "run"
    shutil.move(run.path, moved)
    assert torch.equal(ProbeDataset.open(moved).features(KEYS[0]), features[KEYS[0]])


def test_a_lost_store_is_named(build_run: BuildRun, planted: Plant) -> None:
    run = build_run(*planted(KEYS, None, n=6))
    shutil.rmtree(run.path / "activations")
    with pytest.raises(ProbeDataError, match=r"activations/session is not a session"):
        ProbeDataset.open(run.path)


def test_a_lost_rollout_is_named(build_run: BuildRun, planted: Plant) -> None:
    run = build_run(*planted(KEYS, None, n=6))
    for file in (run.path / "activations/session/index").iterdir():
        file.unlink()
    with pytest.raises(RunError, match=r"lacks 6 of the 6 rollouts .* rollout-00000"):
        ProbeDataset.open(run.path)


@pytest.mark.parametrize(("answer", "other"), [(False, True), (True, False)])
def test_one_class_is_refused(build_run: BuildRun, planted: Plant, answer: Any, other: Any) -> None:
    features, _ = planted(KEYS, None, n=8)
    run = build_run(features, [answer] * 8)
    with pytest.raises(OneClassError, match=rf"all 8 samples have correct = {answer}: a probe needs both classes"):
        ProbeDataset.open(run.path)


def test_a_class_within_one_problem_is_refused(build_run: BuildRun, planted: Plant) -> None:
    features, _ = planted(KEYS, None, n=4)
    run = build_run(features, [True, True, False, False], problems=["a", "a", "b", "c"])
    with pytest.raises(OneClassError, match=r"only one problem has samples with correct = True"):
        ProbeDataset.open(run.path)


def test_a_run_without_activations_says_so(build_run: BuildRun, planted: Plant) -> None:
    features, correct = planted(KEYS, None, n=4)
    run = build_run(features, correct, changes={i: {"rollouts": []} for i in range(4)})
    with pytest.raises(RunError, match=r"no activations: none of its 4 samples"):
        ProbeDataset.open(run.path)


def test_unknown_words_are_answered_with_the_known_ones(build_run: BuildRun, planted: Plant) -> None:
    run: Run = build_run(*planted(KEYS, None, n=4))
    with pytest.raises(ProbeDataError, match=r"label: 'happy' .* correct, truncated, difficulty"):
        ProbeDataset.open(run.path, "happy")
    data = ProbeDataset.open(run.path)
    with pytest.raises(ProbeDataError, match=r"positions: 'all' .* last_prompt, .* mean_generated, before_answer"):
        data.features(KEYS[0], "all")
    with pytest.raises(ProbeDataError, match=r"key: 'layers.9.resid_post' .* layers.2.resid_post"):
        data.features("layers.9.resid_post")


def test_positions_that_were_not_stored_are_refused(build_run: BuildRun, planted: Plant) -> None:
    run = build_run(*planted(KEYS, None, n=4), positions="last")
    data = ProbeDataset.open(run.path)
    assert data.features(KEYS[0], "last").shape == (4, 24)
    with pytest.raises(ProbeDataError, match=r"positions: 'last_prompt' .* stores positions 'last'"):
        data.features(KEYS[0])


def test_values_that_are_not_finite_are_refused(build_run: BuildRun, planted: Plant) -> None:
    features, correct = planted(KEYS, None, n=6)
    features[KEYS[1]][2, 5] = np.inf
    run = build_run(features, correct)
    with pytest.raises(ProbeDataError, match=r"layers.10.resid_post has non-finite values in 1 of 6"):
        ProbeDataset.open(run.path).features(KEYS[1])


def test_rows_that_are_all_nan_are_not_taken_for_padding(build_run: BuildRun, planted: Plant) -> None:
    features, correct = planted(KEYS, None, n=6)
    features[KEYS[1]][2] = np.nan
    run = build_run(features, correct)
    data = ProbeDataset.open(run.path)
    assert len(data.features(KEYS[0], "tokens")) == 6
    for positions in ("tokens", "last_prompt"):
        with pytest.raises(ProbeDataError, match=r"layers.10.resid_post has non-finite values in 1 of 6"):
            data.features(KEYS[1], positions)


def test_another_session_is_joined_on_the_key(build_run: BuildRun, planted: Plant) -> None:
    """Sessions "one" and "two" each hold half of the samples; the record's own rollout ids are not looked at."""
    features, _ = planted(KEYS, None, n=12)
    correct = [True, True, False, False] * 3
    problems = [f"p{i // 2}" for i in range(12)]
    run = build_run(features, correct, problems=problems, sessions=("one", "two"), changes={2: {"rollouts": []}})
    data = ProbeDataset.open(run.path, session=run.path / "activations" / "one")
    assert torch.equal(data.features(KEYS[0]), features[KEYS[0]][::2])
    assert data.left_out == 6
    assert data.groups.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_session_of_other_texts_is_refused(build_run: BuildRun, planted: Plant) -> None:
    run = build_run(*planted(KEYS, None, n=6))
    samples = [sample.model_copy(update={"config_hash": "another"}) for sample in run.read_samples()]
    run.record_path.write_text("".join(s.model_dump_json() + "\n" for s in samples))
    with pytest.raises(RunError, match=r"session holds none of the 6 samples .*`roentgen capture"):
        ProbeDataset.open(run.path, session=run.path / "activations" / "session")
    with pytest.raises(ProbeDataError, match=r"not a session"):
        ProbeDataset.open(run.path, session="nowhere")


def test_what_is_not_asked_for_is_not_loaded(build_run: BuildRun) -> None:
    """Two keys at one position, of a session twenty-five times as large: what is held is what is used."""
    n, d = 100, 4096
    keys = [f"layers.{layer}.resid_post" for layer in range(10)]
    run = build_run({key: torch.randn(n, d) for key in keys}, [i % 2 == 0 for i in range(n)])
    stored = sum(file.stat().st_size for file in (run.path / "activations").rglob("*.safetensors"))
    data = ProbeDataset.open(run.path)
    data.features(keys[0])  # whatever is imported and kept for good is there
    before = own_memory()
    features = [data.features(key) for key in keys[1:3]]
    grown = own_memory() - before
    assert stored > 80e6
    assert grown < sum(part.nbytes for part in features) + 3e6


def own_memory() -> int:
    """Return the bytes that are this process's own: not the pages of mapped files, which the system may take back."""
    info = psutil.Process().memory_info()
    return info.rss - info.shared
