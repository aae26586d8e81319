"""A page over a small run with planted activations and saved probes, asked as a browser asks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from roentgen.linear_probe import ProbeCard, SavedProbe, save_probes
from roentgen.runs import Run
from roentgen.view.app import make_app
from roentgen.view.library import Library
from tests.probes.conftest import build_run, planted

__all__ = ["build_run", "planted"]

KEYS = ("layers.1.resid_post", "layers.3.resid_post", "final_norm")
TOKEN = "secret"
HOSTILE = '<script>alert("x")</script> \u202egnp.exe \u200f'

Ask = Callable[..., Any]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROENTGEN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run(build_run: Callable[..., Run], planted: Callable[..., Any]) -> Run:
    """Eight samples: four right, three wrong, one failed; the seventh has hostile texts."""
    features, correct = planted(KEYS, "layers.3.resid_post", n=8, d=6)
    changes: dict[int, dict[str, object]] = {
        i: {
            "question": f"What is {i} + 1?",
            "gold": str(i + 1),
            "response": f"It is {i + 1}.",
            "answers": {"answer": str(i + 1), "flexible": str(i + 1)},
            "correct_by": {"answer": correct[i], "flexible": correct[i]},
            "messages": [
                {"role": "user", "content": f"What is {i} + 1?"},
                {"role": "assistant", "content": f"It is {i + 1}."},
            ],
            "fields": {"difficulty": i / 2, "topic": "sums" if i < 5 else "more", "hard": i > 3},
            "seconds": float(i),
        }
        for i in range(8)
    }
    changes[1] |= {"answers": {"answer": None, "flexible": "7"}, "correct_by": {"answer": False, "flexible": True}}
    changes[6] |= {"response": HOSTILE, "question": HOSTILE}
    changes[7] = {"error": "the server hung up", "rollouts": [], "question": "What is 7 + 1?"}
    made = build_run(features, correct, changes=changes)
    generator = torch.Generator().manual_seed(5)
    probes = [
        SavedProbe(
            torch.randn(1, 6, generator=generator), torch.randn(1, generator=generator), torch.randn(6, generator=generator),
            torch.rand(6, generator=generator) + 0.5, _card(key),
        )
        for key in KEYS[:2]
    ]  # fmt: skip
    save_probes(made.path / "probes" / "correct", probes)
    return made


def _card(key: str) -> ProbeCard:
    return ProbeCard(
        model="m", revision="r", key=key, positions="last_prompt", kind="logistic", label="correct", target="binary",
        unit="log_odds", strength=1.0, folds=5, metrics={}, data_hash="c0ffee", seed=0, roentgen="0.1.0",
    )  # fmt: skip


@pytest.fixture
def ask(run: Run) -> Ask:
    """Ask the page over the run and its sessions."""
    return asker(run.path, run.path / "activations")


def asker(*addresses: Path | str) -> Ask:
    """Return what asks a page over some addresses."""
    client = TestClient(make_app(Library(map(str, addresses)), lambda: [TOKEN]), base_url="http://127.0.0.1:8000")

    def asked(url: str, status: int = 200, **parameters: str | int) -> Any:
        reply = client.get(url, params=parameters or None, headers={"Authorization": f"Bearer {TOKEN}"})
        assert reply.status_code == status, reply.text
        return reply.json()

    return asked


def source_ids(ask: Ask) -> dict[str, str]:
    """Return the id of the run, and that of the session."""
    return {source["kind"]: source["id"] for source in ask("/api/sources")["sources"]}
