"""A run as an evaluation leaves it: five problems, one of two turns, one failed, its rows in a real store."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from eval_jobs.hashed_config import ServedModelInfo
from eval_jobs.resume import open_run
from eval_jobs.settings import check_settings
from roentgen.contract import RolloutKey, StoredTensor
from roentgen.runs import RolloutRef, Run, Sample, recording
from roentgen.store import CapturedRollout, StoreWriter
from tests.eval_jobs.conftest import take
from tests.eval_jobs.test_outputs import REPLIES, sample
from tests.roentgen.store.conftest import KEYS, RolloutFactory

TWO_TURNS, FAILED = 2, 5


@dataclass(frozen=True)
class Kept:
    """A run, and the rollouts that its samples' turns are."""

    run: Run
    rollouts: dict[tuple[str, int], CapturedRollout]


MakeRun = Callable[..., Kept]


@pytest.fixture
def make_run(tmp_path: Path, rollout: RolloutFactory) -> MakeRun:
    def make(*, keys: tuple[str, ...] = KEYS, positions: str = "all", dtype: torch.dtype = torch.bfloat16) -> Kept:
        """Make it under `tmp_path / "run"`.

        Args:
            keys: what was stored; nothing if there are none.
            positions: of the rows.
            dtype: of the rows.
        """
        settings = check_settings(
            samples=5, output=tmp_path / "run", collect_activations=True, layers="1,2", hook_points="resid_post"
        )
        problems = take("arithmetic", 5)
        run = open_run(settings, problems, ServedModelInfo("m", "r", "float32", 3, 8), "http://h:1/v1")
        kept: dict[tuple[str, int], CapturedRollout] = {}
        with recording(run) as record, StoreWriter(tmp_path / "store", max_wait_s=0) as writer:
            for problem in reversed(problems):
                done = sample(problem, *REPLIES[problem.number], rollouts=False)
                refs = []
                for turn in range((problem.number == TWO_TURNS) + 1 if keys and problem.number != FAILED else 0):
                    key = RolloutKey(config_hash=done.config_hash, problem_id=done.problem_id, turn=turn)
                    made = rollout(3 + problem.number, 4, keys=keys, positions=positions, dtype=dtype)
                    made = replace(made, key=key, labels={"gold": done.gold, "sample_id": done.sample_id})
                    kept[done.sample_id, turn] = made
                    refs.append(_ref(turn, made, writer))
                record.append(Sample.model_validate(done.model_dump() | {"rollouts": refs}))
        return Kept(run, kept)

    return make


def _ref(turn: int, made: CapturedRollout, writer: StoreWriter) -> RolloutRef:
    receipt = writer.submit(made).result()
    tensors = {
        key: StoredTensor(shape=tuple(values.shape), dtype=str(values.dtype), stored_path=receipt.shard)
        for key, values in made.tensors.items()
    }
    return RolloutRef(
        turn=turn, session_id=receipt.session_id, rollout_id=receipt.rollout_id, uri=receipt.uri, shard=receipt.shard,
        row_start=receipt.row_start, row_stop=receipt.row_stop, tensors=tensors,
    )  # fmt: skip


@pytest.fixture
def rollout() -> RolloutFactory:
    return RolloutFactory()
