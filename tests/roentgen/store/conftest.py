"""Rollouts with random rows, constructed as by the server."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ulid import ULID

from roentgen.contract import Positions, RolloutKey
from roentgen.store import CapturedRollout, CaptureSpec
from roentgen.tokenized_text import Segment, TokenizedText
from tests.s3 import BUCKET, ENVIRONMENT, s3_endpoint

KEYS = ("layers.1.resid_post", "layers.2.resid_post")


class RolloutFactory:
    """Creates rollouts; `last` keeps the created one for comparison."""

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
    ) -> CapturedRollout:
        n_rows = n_prompt + max(n_completion - 1, 0)
        policy = Positions.parse(positions)
        position = np.array(policy.select(n_prompt, n_rows), dtype=np.int32)
        tensors = {key: torch.randn(len(position), d).to(dtype) for key in keys}
        tokens = list(range(100, 100 + n_prompt + n_completion))
        return CapturedRollout(
            session_id=session,
            rollout_id=str(ULID()),
            spec=CaptureSpec(model="m", revision="r", keys=keys, positions=positions, dtype=str(dtype)),
            tensors=tensors,
            position=position,
            sequence=TokenizedText(
                text="x" * len(tokens),
                token_ids=tokens,
                token_offsets=list(range(len(tokens))),
                segments=[Segment("user", 0, n_prompt), Segment("assistant", n_prompt, len(tokens))],
                n_prompt=n_prompt,
            ),
            logprobs=np.array([np.nan] * n_prompt + [-0.5] * (n_completion - 1) + [-1.0] * (n_completion > 0)),
            finish_reason="stop",
            key=RolloutKey(config_hash="c", problem_id=problem) if problem else None,
            labels={"problem": problem},
        )


def spoil_labels(store: Path, labels: str) -> None:
    """Put labels into the one index file of session "s" that this version does not let in."""
    (file,) = (store / "s/index").iterdir()
    table = pq.read_table(file)
    affected = pa.array([labels] * len(table), pa.string())
    pq.write_table(table.set_column(table.column_names.index("labels"), "labels", affected), file)


@pytest.fixture
def rollout() -> RolloutFactory:
    return RolloutFactory()


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real S3 endpoint, for the tests of this folder."""
    with s3_endpoint(tmp_path_factory.mktemp("s3") / "moto.log") as address:
        yield address


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store's address: once on a disk, once in a bucket."""
    if request.param == "folder":
        return str(tmp_path / "store")
    for name, value in (ENVIRONMENT | {"AWS_ENDPOINT_URL": request.getfixturevalue("endpoint")}).items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{tmp_path.name}/store"
