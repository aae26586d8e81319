"""Rollouts with random rows, made the way the server makes them."""

import numpy as np
import pytest
import torch
from ulid import ULID

from roentgen.contract import Positions, RolloutKey
from roentgen.store import CaptureSpec, Rollout, Segment

KEYS = ("layers.1.resid_post", "layers.2.resid_post")


class RolloutFactory:
    """Makes rollouts; `last` keeps what was made, to compare with what is read."""

    def __call__(
        self,
        n_prompt: int = 4,
        n_completion: int = 3,
        *,
        session: str = "s",
        keys: tuple[str, ...] = KEYS,
        positions: str = "all",
        dtype: torch.dtype = torch.bfloat16,
        problem: str | None = None,
        d: int = 8,
    ) -> Rollout:
        n_rows = n_prompt + max(n_completion - 1, 0)
        policy = Positions.parse(positions)
        position = np.array(policy.select(n_prompt, n_rows), dtype=np.int32)
        tensors = {key: torch.randn(len(position), d).to(dtype) for key in keys}
        tokens = list(range(100, 100 + n_prompt + n_completion))
        return Rollout(
            session_id=session,
            rollout_id=str(ULID()),
            spec=CaptureSpec(model="m", revision="r", keys=keys, positions=positions, dtype=str(dtype)),
            tensors=tensors,
            position=position,
            row_token_id=np.array(tokens)[position],
            row_logprob=np.where(position >= n_prompt, -0.5, np.nan),
            token_ids=tokens,
            token_offsets=list(range(len(tokens))),
            n_prompt=n_prompt,
            text="x" * len(tokens),
            segments=[Segment("user", 0, n_prompt), Segment("assistant", n_prompt, len(tokens))],
            finish_reason="stop",
            final_logprob=-1.0,
            key=RolloutKey(config_hash="c", problem_id=problem) if problem else None,
            labels={"problem": problem},
        )


@pytest.fixture
def rollout() -> RolloutFactory:
    return RolloutFactory()
