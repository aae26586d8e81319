"""A real run directory with a real store and planted activations."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from probes.report import Best, Estimate, KeyResult, ProbeReport
from roentgen.contract import RolloutKey, StoredTensor
from roentgen.runs import RolloutRef, Run, RunConfig, Sample, create_run, recording
from roentgen.store import CapturedRollout, CaptureSpec, StoreWriter
from roentgen.tokenized_text import Segment, TokenizedText

N_PROMPT, N_COMPLETION = 3, 3
N_ROWS = N_PROMPT + N_COMPLETION - 1

BuildRun = Callable[..., Run]
Plant = Callable[..., tuple[dict[str, Tensor], list[bool]]]


@pytest.fixture
def build_run(tmp_path: Path) -> BuildRun:
    """Return a function that writes a run: one sample per row of the features, which are at the last prompt token."""

    def build(
        features: Mapping[str, Tensor],
        correct: Sequence[bool],
        *,
        problems: Sequence[str] | None = None,
        prompt_tokens: Sequence[int] | None = None,
        changes: Mapping[int, dict[str, object]] | None = None,
        positions: str = "all",
        sessions: Sequence[str] = ("session",),
    ) -> Run:
        """Write it.

        Args:
            features: per key, `[samples, d]`.
            correct: per sample.
            problems: the problem of each sample; by default each has its own.
            prompt_tokens: what the samples say of their prompts' lengths.
            changes: other fields of some samples, by number.
            positions: the policy under which rows are stored.
            sessions: dealt to the samples in turn.
        """
        n = len(correct)
        problems = problems or [f"problem-{i}" for i in range(n)]
        prompt_tokens = prompt_tokens or [N_PROMPT] * n
        spec = CaptureSpec(model="m", revision="r", keys=tuple(features), positions=positions, dtype="torch.float32")
        run = create_run(tmp_path / "run", RunConfig(
            run_id="run", created="2025-01-01T00:00:00Z", config_hash="c0ffee", hashed={}, problems={},
            settings={"extractor": "answer"},
            prompt={}, versions={},
        ))  # fmt: skip
        seen: dict[str, int] = {}
        epochs = []
        with StoreWriter(run.path / "activations", max_wait_s=0.01) as writer:
            pending = []
            for i in range(n):
                seen[problems[i]] = seen.get(problems[i], 0) + 1
                epochs.append(seen[problems[i]])
                key = RolloutKey(config_hash="c0ffee", problem_id=problems[i], epoch=epochs[i])
                rows = {name: _rows(values[i]) for name, values in features.items()}
                session = sessions[i % len(sessions)]
                pending.append(writer.submit(_rollout(session, f"rollout-{i:05}", spec, rows, key)))
            receipts = [future.result() for future in pending]
        with recording(run) as record:
            for i, receipt in enumerate(receipts):
                tensors = {
                    name: StoredTensor(shape=(N_ROWS, v.shape[1]), dtype=spec.dtype, stored_path=receipt.shard)
                    for name, v in features.items()
                }
                ref = RolloutRef(
                    turn=0, session_id=receipt.session_id, rollout_id=receipt.rollout_id, uri=receipt.uri,
                    shard=receipt.shard, row_start=receipt.row_start, row_stop=receipt.row_stop, tensors=tensors,
                )  # fmt: skip
                fields: dict[str, object] = {
                    "sample_id": f"gsm8k_{i + 1:04}", "problem_id": problems[i], "epoch": epochs[i],
                    "config_hash": "c0ffee", "question": "?", "solution": "!", "gold": "1", "correct": bool(correct[i]),
                    "finish_reason": "stop",
                    "prompt_tokens": prompt_tokens[i], "completion_tokens": N_COMPLETION, "rollouts": [ref],
                }  # fmt: skip
                record.append(Sample.model_validate(fields | (changes or {}).get(i, {})))
        return run

    return build


@pytest.fixture
def planted() -> Plant:
    """Return a function that makes features with the label planted in one key's direction, and noise in the others."""

    def make(
        keys: Sequence[str], signal: str | None, n: int = 80, d: int = 24, strength: float = 4.0, seed: int = 2
    ) -> tuple[dict[str, Tensor], list[bool]]:
        generator = torch.Generator().manual_seed(seed)
        correct = torch.arange(n) % 2 == 0
        features = {key: torch.randn(n, d, generator=generator) for key in keys}
        if signal is not None:
            direction = torch.randn(d, generator=generator)
            features[signal] += strength * (correct.float()[:, None] - 0.5) * direction / direction.norm()
        return features, correct.tolist()

    return make


def _rows(last_prompt: Tensor) -> Tensor:
    """Return a rollout's rows: row t differs by t from the wanted one, so that reading a wrong row is detected."""
    offsets = torch.arange(N_ROWS) - (N_PROMPT - 1)
    return last_prompt + 100.0 * offsets[:, None]


def _rollout(
    session_id: str, rollout_id: str, spec: CaptureSpec, rows: dict[str, Tensor], key: RolloutKey
) -> CapturedRollout:
    kept = {"all": slice(None), "last": slice(-1, None)}[spec.positions]
    return CapturedRollout(
        session_id=session_id,
        rollout_id=rollout_id,
        spec=spec,
        tensors={name: values[kept].contiguous() for name, values in rows.items()},
        position=np.arange(N_ROWS)[kept],
        sequence=TokenizedText(
            text="abcdef",
            token_ids=[0] * (N_PROMPT + N_COMPLETION),
            token_offsets=list(range(N_PROMPT + N_COMPLETION)),
            segments=[Segment("user", 0, N_PROMPT)],
            n_prompt=N_PROMPT,
        ),
        logprobs=np.zeros(N_PROMPT + N_COMPLETION),
        finish_reason="stop",
        key=key,
    )


def auroc_of(value: float, low: float, high: float) -> Estimate:
    return Estimate("auroc", value, low, high)


def result(hook_point: str, layer: int | None, auroc: float) -> KeyResult:
    key = hook_point if layer is None else f"layers.{layer}.{hook_point}"
    return KeyResult(key, "last_prompt", auroc_of(auroc, auroc - 0.1, auroc + 0.1), 0.01)


@pytest.fixture
def report() -> ProbeReport:
    keys = (
        result("embed", None, 0.5),
        *(result("resid_post", layer, 0.5 + layer / 50) for layer in range(0, 12, 2)),
        *(result("ln_mlp", layer, 0.45 + layer / 50) for layer in range(0, 12, 2)),
        result("final_norm", None, 0.7),
    )
    return ProbeReport(
        sources=("run",), label="correct", target="binary", classes=(), kind="logistic", positions=("last_prompt",), seed=0,
        roentgen="0.1.0", data_hash="c0ffee", n_samples=100, n_problems=50, n_left_out=0, n_folds=5, n_rarest=40, n_true=40,
        results=keys, declared=None,
        best=Best(auroc_of(0.7, 0.61, 0.79), ("layers.10.resid_post@last_prompt",) * 5),
        baselines={
            "prompt_length": auroc_of(0.55, 0.45, 0.65),
            "response_length": auroc_of(0.56, 0.46, 0.66),
            "shuffled_labels": auroc_of(0.49, 0.39, 0.59),
        },
    )  # fmt: skip
