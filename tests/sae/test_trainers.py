"""Sparse autoencoders of three libraries are trained on stored rows, by their own trainers (`make test-sae`)."""

from pathlib import Path
from typing import Any

import pytest
import torch

from roentgen.store import Session, StoreWriter
from roentgen.store.batches import TokenBatches
from tests.roentgen.store.conftest import RolloutFactory

WIDTH, DIRECTIONS = 16, 24
KEY = "layers.1.resid_post"


@pytest.fixture
def rows(tmp_path: Path) -> TokenBatches:
    """Stored rows that are sums of few of many directions, in batches."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(DIRECTIONS, WIDTH, generator=generator), dim=1)
    make = RolloutFactory()
    with StoreWriter(tmp_path) as writer:
        for _ in range(40):
            rollout = make(60, 1, keys=(KEY,), d=WIDTH, dtype=torch.float32)
            strengths = torch.rand(60, DIRECTIONS, generator=generator)
            strengths *= torch.rand(60, DIRECTIONS, generator=generator) < 0.1
            rollout.tensors[KEY].copy_(strengths @ directions)
            writer.submit(rollout)
    return Session.open(tmp_path / "s").activations(KEY).batches(256, seed=1)


def explained(rows: TokenBatches, reconstruct: Any) -> float:
    """Return the share of the rows' variance that a reconstruction has."""
    X = torch.cat(list(rows.tensors()))
    with torch.no_grad():
        return float(1 - (reconstruct(X) - X).square().sum() / (X - X.mean(0)).square().sum())


def test_saelens(rows: TokenBatches) -> None:
    pytest.importorskip("sae_lens", reason="make test-sae installs it")
    from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=WIDTH, d_sae=64, l1_coefficient=0.01))
    before = explained(rows, sae)
    cfg = SAETrainerConfig(total_training_samples=150_000, train_batch_size_samples=256, lr=3e-3, lr_end=3e-4)
    SAETrainer(cfg, sae, data_provider=rows.tensors(epochs=None)).fit()
    assert explained(rows, sae) > max(0.8, before)


def test_dictionary_learning(rows: TokenBatches, tmp_path: Path) -> None:
    pytest.importorskip("dictionary_learning", reason="make test-sae installs it")
    from dictionary_learning import AutoEncoder
    from dictionary_learning.trainers.standard import StandardTrainer
    from dictionary_learning.training import trainSAE

    steps = 600
    config = {
        "trainer": StandardTrainer, "steps": steps, "activation_dim": WIDTH, "dict_size": 64, "layer": 1, "lm_name": "m",
        "lr": 3e-3, "l1_penalty": 0.01, "warmup_steps": 10, "sparsity_warmup_steps": 10, "device": "cpu", "seed": 0,
    }  # fmt: skip
    trainSAE(rows.tensors(epochs=None), [config], steps, save_dir=str(tmp_path / "sae"), device="cpu")
    trained = AutoEncoder.from_pretrained(str(tmp_path / "sae/trainer_0/ae.pt"), device="cpu")
    assert explained(rows, trained) > 0.8


def test_sparsify(rows: TokenBatches) -> None:
    pytest.importorskip("sparsify", reason="make test-sae installs it")
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    coder = SparseCoder(WIDTH, SparseCoderConfig(num_latents=64, k=8))
    optimizer = torch.optim.Adam(coder.parameters(), 3e-3)
    before = explained(rows, lambda X: coder(X).sae_out)
    for X in rows.tensors(epochs=40):
        optimizer.zero_grad()
        coder(X).fvu.backward()
        optimizer.step()
    assert explained(rows, lambda X: coder(X).sae_out) > max(0.8, before)
