"""Controls with a known answer on activations of a real run: SmolLM2-135M, sums, through the server and the store."""

import numpy as np
import pytest
import torch
from torch import Tensor

from probes.bootstrap import bootstrap_weights
from probes.dataset import ProbeDataset
from probes.evaluation import evaluate, main_estimate, nested_best
from probes.folds import nested_folds, shuffle_labels
from probes.kinds import KINDS
from probes.labels import Target
from tests.conftest import RayHome, Server
from tests.test_main_job import roentgen

pytestmark = pytest.mark.integration

KEYS = tuple(f"layers.{layer}.resid_post" for layer in (8, 16, 24))
PLANTED = 1
SAMPLES = 64


@pytest.fixture(scope="module")
def data(server: Server, tmp_path_factory: pytest.TempPathFactory) -> ProbeDataset:
    """A run with right and wrong answers; opening it says so if there is one class only."""
    output = tmp_path_factory.mktemp("runs") / "sums"
    options = ["eval", "--problems", "arithmetic", "--samples", str(SAMPLES), "--max-tokens", "32", "--parallel", "32"]
    options += [
        "--collect-activations",
        "--layers",
        "8,16,24",
        "--hook-points",
        "resid_post",
        "--positions",
        "last_prompt",
    ]
    done = roentgen(RayHome("/tmp/rt-real"), *options, "--output", str(output), "--base-url", server.base_url)
    assert done.returncode == 0, done.stderr
    return ProbeDataset.open(output)


@pytest.fixture(scope="module")
def rows(data: ProbeDataset) -> Tensor:
    return torch.stack([data.features(key) for key in KEYS])


def labels(seed: int) -> Target:
    """Half True, dealt at random: nothing in the activations goes with them."""
    return Target("planted", "binary", np.random.default_rng(seed).permutation(np.arange(SAMPLES) % 2 == 0))


def planted(X: Tensor, target: Target, seed: int) -> Tensor:
    """Move one layer's rows to either side, along a random direction, by three times their typical distance from the mean."""
    direction = torch.randn(X.shape[-1], generator=torch.Generator().manual_seed(seed))
    side = 2 * torch.from_numpy(target.values).float()[:, None] - 1
    moved = X.clone()
    moved[PLANTED] += 3 * side * X[PLANTED].std(0).norm() * torch.nn.functional.normalize(direction, dim=0)
    return moved


def test_a_planted_direction_is_found_at_its_layer_and_nowhere_else(data: ProbeDataset, rows: Tensor) -> None:
    draws = bootstrap_weights(data.groups, draws=300)
    elsewhere = []
    for seed in range(10):
        target = labels(seed)
        folds = nested_folds(target, data.groups)
        (found,) = evaluate(planted(rows, target, seed), [target], data.groups, folds, KINDS["logistic"])
        estimates = [main_estimate(scores, target, data.groups, draws) for scores in found.scores]
        assert estimates.pop(PLANTED).value >= 0.99
        assert set(nested_best(found, folds)[2]) == {PLANTED}
        elsewhere += [estimate.low <= 0.5 <= estimate.high for estimate in estimates]
    assert len(elsewhere) == 20
    assert sum(elsewhere) >= 17


def test_on_shuffled_labels_intervals_contain_one_half(data: ProbeDataset, rows: Tensor) -> None:
    folds = nested_folds(data.target, data.groups)
    shuffled = [shuffle_labels(data.target, data.groups, folds, seed) for seed in range(100)]
    draws = bootstrap_weights(data.groups, draws=300)
    covered = 0
    evaluations = evaluate(rows[PLANTED : PLANTED + 1], shuffled, data.groups, folds, KINDS["logistic"])
    for target, found in zip(shuffled, evaluations, strict=True):
        estimate = main_estimate(found.scores[0], target, data.groups, draws)
        covered += estimate.low <= 0.5 <= estimate.high
    assert covered >= 89
