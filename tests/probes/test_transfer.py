from typing import Any

import pytest
import torch

import probes
from probes.dataset import ProbeDataset
from probes.errors import ProbeDataError
from probes.transfer import _split_shared_problems, transfer
from tests.probes.conftest import BuildRun

KEYS = ("layers.1.resid_post", "layers.2.resid_post")


@pytest.fixture
def sessions(build_run: BuildRun) -> Any:
    """Two halves of one run, in sessions of their own: the same direction at layer 1, the opposite one at layer 2."""
    generator = torch.Generator().manual_seed(0)
    n, d = 160, 16
    correct = (torch.arange(n) // 2) % 2 == 0
    sign = 2 * correct.float()[:, None] - 1
    features = {key: torch.randn(n, d, generator=generator) for key in KEYS}
    features[KEYS[0]][:, :1] += 3 * sign
    features[KEYS[1]][0::2, 1:2] += 3 * sign[0::2]
    features[KEYS[1]][1::2, 1:2] -= 3 * sign[1::2]
    run = build_run(features, correct.tolist(), sessions=("one", "two"), problems=[f"p{i // 2}" for i in range(n)])
    table = run.path / "labels.csv"
    rows = [f"p{i},{int(i % 2 == 0)}" for i in range(n // 2)]
    table.write_text("\n".join(["problem_id,right", *rows]))
    return [run.path / "activations" / name for name in ("one", "two")], table


def test_a_shared_direction_carries_over_and_an_opposite_one_misleads(sessions: Any) -> None:
    paths, table = sessions
    one, two = (ProbeDataset.open(path, "right", table=table) for path in paths)
    same, other = transfer(one, two, list(KEYS))
    assert same.value > 0.95
    assert other.high < 0.1


def test_no_problem_is_on_both_sides(sessions: Any) -> None:
    paths, table = sessions
    one, two = (ProbeDataset.open(path, "right", table=table) for path in paths)
    learn, judge = _split_shared_problems(one, two, 0)
    taught = {e.problem for e, kept in zip(one.examples, learn, strict=True) if kept}
    tested = {e.problem for e, kept in zip(two.examples, judge, strict=True) if kept}
    assert not taught & tested
    assert len(taught) == len(tested) == 40


def test_comparison_gives_cosines_and_both_ways(sessions: Any) -> None:
    (one, two), table = sessions
    found = probes.compare(one, two, label="right", table=table, kind="mean_difference")
    assert found.names == ("one", "two")
    shared, apart = found.keys
    for compared in found.keys:  # against the means themselves
        apart_by = []
        for path in (one, two):
            data = ProbeDataset.open(path, "right", table=table)
            X, y = data.features(compared.key).double(), torch.from_numpy(data.target.values)
            apart_by.append(X[y].mean(0) - X[~y].mean(0))
        expected = apart_by[0] @ apart_by[1] / apart_by[0].norm() / apart_by[1].norm()
        assert compared.cosine == pytest.approx(float(expected), abs=1e-6)
    assert min(shared.there.value, shared.back.value) > 0.95
    assert max(apart.there.value, apart.back.value) < 0.05
    with pytest.raises(ProbeDataError, match="label: 'happy'"):
        probes.compare(one, two, label="happy")
