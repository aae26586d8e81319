"""Exports contain the stored data in the formats that other tools read."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from roentgen.store import CapturedRollout, Session, StoreError, StoreWriter
from roentgen.store.exports import all_to_hf, export_pt, to_hf, to_ray, to_torch
from tests.roentgen.store.conftest import RolloutFactory

KEYS = ("layers.12.ln_attn", "layers.12.ln_mlp")


@pytest.fixture
def written(store: str, rollout: RolloutFactory) -> dict[str, CapturedRollout]:
    """Five rollouts of a session, by id."""
    made = [rollout(n, 3, session="a_b", keys=KEYS, problem=f"p{n}") for n in range(1, 6)]
    with StoreWriter(store, max_wait_s=0) as writer:
        for one in made:
            writer.submit(one).result()
    return {one.rollout_id: one for one in made}


# The snippets of the tool that Roentgen replaces, with their two bugs put right: `map_location` names a device that is there,
# and the session's field is the one after the first underscore of the file's name, not of its path.
SNIPPETS = """
import glob
import os

import numpy as np
import torch

files = glob.glob('activations_*.pt')
layer12_files = [f for f in files if 'layer_12_input_layernorm_output' in f]
activations = []
for file in layer12_files:
    tensor = torch.load(file, map_location='cpu')
    pooled = tensor.mean(dim=1).squeeze(0)
    activations.append(pooled.cpu().numpy())
X = np.stack(activations)
print(X.shape, tensor.dtype)

sessions = set(os.path.basename(f).split('_')[1] for f in files)
for session in list(sessions)[:2]:
    session_files = [f for f in files if f'_{session}_' in f]
    print(session, len(session_files))
"""


def test_scripts_for_loose_files_go_on_working(store: str, written: dict[str, CapturedRollout], tmp_path: Path) -> None:
    session, folder = Session.open(f"{store}/a_b"), tmp_path / "out"
    told: list[int] = []
    assert export_pt(session, folder, on_progress=told.append) == 10
    assert told == [1, 2, 3, 4, 5]
    done = subprocess.run([sys.executable, "-c", SNIPPETS], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["(5, 8) torch.float32", "a-b 10"]
    for one in written.values():
        name = f"activations_a-b_{one.rollout_id}_layer_12_post_attention_layernorm_output.pt"
        expected = one.tensors[KEYS[1]].float().unsqueeze(0)
        assert torch.equal(torch.load(folder / name, weights_only=True), expected)
        assert os.path.getsize(folder / name) < expected.nbytes + 4096  # the file holds its rows and no others
    (folder / name).unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert export_pt(session, folder) == 10  # again: only what is missing
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())


def test_a_rollout_that_is_damaged_is_left_out_and_named(tmp_path: Path, rollout: RolloutFactory) -> None:
    written = [rollout() for _ in range(3)]
    for one in written:  # each in a shard of its own
        with StoreWriter(tmp_path, merge_shards=0) as writer:
            receipt = writer.submit(one).result()
    affected, *_ = sorted((tmp_path / "s/shards").iterdir())
    affected.write_bytes(affected.read_bytes()[:50])
    with pytest.raises(StoreError, match=rf"1 of 3 rollouts cannot be read .*the first is {written[0].rollout_id}: "):
        export_pt(Session.open(receipt.uri), tmp_path / "out")
    assert {path.name.split("_")[2] for path in (tmp_path / "out").iterdir()} == {one.rollout_id for one in written[1:]}


def test_a_torch_dataset_is_read_by_several_workers(store: str, written: dict[str, CapturedRollout]) -> None:
    data = to_torch(Session.open(f"{store}/a_b"), KEYS[0], positions="generated")
    assert len(data) == 5
    # A bucket's client does not survive a fork.
    seen = list(DataLoader(data, batch_size=None, num_workers=0 if store.startswith("s3://") else 2))
    assert sorted(item["rollout_id"] for item in seen) == sorted(written)
    for item in seen:
        one = written[item["rollout_id"]]
        assert torch.equal(item["values"], one.tensors[KEYS[0]][one.sequence.n_prompt :])
        assert item["position"].tolist() == [one.sequence.n_prompt, one.sequence.n_prompt + 1]
        assert item["labels"] == one.labels


def test_all_keys_are_given_away_as_a_dataset_each(
    written: dict[str, CapturedRollout], store: str, tmp_path: Path
) -> None:
    from datasets import load_from_disk

    session = Session.open(f"{store}/a_b")
    all_to_hf(session).save_to_disk(tmp_path / "hf")
    back = load_from_disk(tmp_path / "hf")
    assert tuple(back) == KEYS
    for key in KEYS:
        found = {row["rollout_id"]: np.array(row["values"]) for row in back[key]}
        for rollout_id, rollout in written.items():
            np.testing.assert_array_equal(found[rollout_id], rollout.tensors[key].float().numpy())


def test_a_hugging_face_dataset_goes_to_disk_and_back(
    store: str, written: dict[str, CapturedRollout], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    to_hf(Session.open(f"{store}/a_b"), KEYS[0]).save_to_disk(tmp_path / "hf")
    for row in datasets.load_from_disk(tmp_path / "hf"):
        one = written[row["rollout_id"]]
        assert row["problem_id"] == one.labels["problem"]
        assert np.allclose(row["values"], one.tensors[KEYS[0]].float().numpy(), atol=0)
        assert row["position"] == one.position.tolist()


@pytest.mark.integration
@pytest.mark.parametrize("store", ["folder"], indirect=True)
def test_a_ray_dataset_is_read_by_rays_tasks(store: str, written: dict[str, CapturedRollout]) -> None:
    import ray

    session = Session.open(f"{store}/a_b")
    wanted = session.rollouts(columns=("labels",)).query("problem_id != 'p3'")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        rows = to_ray(session, KEYS[0], where=wanted, positions="generated").take_all()
    finally:
        ray.shutdown()
    assert sorted(row["problem_id"] for row in rows) == ["p1", "p2", "p4", "p5"]
    for row in rows:
        one = written[row["rollout_id"]]
        assert np.array_equal(row["values"], one.tensors[KEYS[0]][one.sequence.n_prompt :].float().numpy())
        assert row["position"].tolist() == [one.sequence.n_prompt, one.sequence.n_prompt + 1]
