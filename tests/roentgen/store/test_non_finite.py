"""Rows that are not finite fail only their rollout, or are counted; older index files are read as before."""

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roentgen.store import CapturedRollout, NonFiniteRowsError, Session, StoreWriter, verify
from roentgen.store.index import INDEX_SCHEMA, read_index
from roentgen.store.merging import compact
from roentgen.store.schema import NonFinite, all_finite
from roentgen.store.writer import StoreError
from tests.roentgen.store.conftest import KEYS, RolloutFactory


def affected(
    rollout: CapturedRollout, *, key: int = 1, rows: tuple[int, ...] = (2, 4), value: float = float("nan")
) -> CapturedRollout:
    for row in rows:
        rollout.tensors[KEYS[key]][row, 3] = value
    return replace(rollout, require_finite=True)


def test_a_rollout_that_is_not_finite_fails_and_its_group_does_not(tmp_path: Path, rollout: RolloutFactory) -> None:
    bad = affected(rollout())
    with StoreWriter(tmp_path, max_wait_s=0.2) as writer:
        futures = [writer.submit(one) for one in (rollout(), bad, rollout(), affected(rollout(session="other")))]
        assert [future.exception() is None for future in futures] == [True, False, True, False]
        # Nothing is left of it: neither bytes that count as pending nor a lock.
        assert writer.has_room
        with pytest.raises(
            NonFiniteRowsError, match=r"2 of 6 rows contain NaN or infinity, first layers\.2\.resid_post at position 2"
        ):
            futures[1].result()
        # A whole group may fail, and the next is written.
        assert writer.submit(affected(rollout(), value=float("inf"))).exception() is not None
        writer.submit(rollout()).result()
    session = Session.open(tmp_path / "s")
    assert session.rollouts()["non_finite_rows"].tolist() == [0, 0, 0]
    assert bad.rollout_id not in set(session.rollouts()["rollout_id"])
    assert verify(session).damage == []
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("policy", ["all", "last_prompt", "mean_generated"])
def test_what_is_allowed_is_kept_and_counted(tmp_path: Path, rollout: RolloutFactory, policy: str) -> None:
    one = replace(affected(rollout(positions=policy), rows=(0,)), require_finite=False)
    one.tensors[KEYS[0]][0, 0] = float("-inf")  # the same row under another key counts once
    with StoreWriter(tmp_path) as writer:
        writer.submit(one).result()
        writer.submit(rollout()).result()
    frame = Session.open(tmp_path / "s").rollouts(columns=("non_finite_rows",))
    assert frame["non_finite_rows"].tolist() == [1, 0]
    (item,) = Session.open(tmp_path / "s").activations(KEYS[1], where=frame[frame["non_finite_rows"] > 0])
    torch.testing.assert_close(item.values, one.tensors[KEYS[1]], rtol=0, atol=0, equal_nan=True)
    assert one.non_finite == NonFinite(1, KEYS[0], int(one.position[0]))


def test_an_index_from_before_is_read_and_merged(tmp_path: Path, rollout: RolloutFactory) -> None:
    with StoreWriter(tmp_path, merge_shards=0) as writer:
        writer.submit(rollout()).result()
    (file,) = (tmp_path / "s/index").glob("*.parquet")
    table = pq.read_table(file)
    pq.write_table(table.drop_columns(["non_finite_rows"]), file, write_page_checksum=True)
    with StoreWriter(tmp_path, merge_shards=0) as writer:
        writer.submit(replace(affected(rollout()), require_finite=False)).result()
    session = Session.open(tmp_path / "s")
    assert session.rollouts()["non_finite_rows"].isna().tolist() == [True, False]
    assert "non_finite_rows" not in session.rollouts(columns=("text",))
    ids = session.rollouts()["rollout_id"].tolist()
    assert session.rollouts(ids=ids[:1])["non_finite_rows"].isna().tolist() == [True]
    assert verify(session).damage == []
    compact(session)
    assert Session.open(tmp_path / "s").rollouts()["non_finite_rows"].fillna(-1).tolist() == [-1, 2]
    # Any other column that is missing is damage, as before.
    (merged, *_) = sorted((tmp_path / "s/index").glob("*.parquet"), reverse=True)
    pq.write_table(pq.read_table(merged).drop_columns(["text"]), merged)
    with pytest.raises(StoreError, match="is damaged: its columns"):
        read_index(session.folder.child("index"), merged.name)
    assert "non_finite_rows" in INDEX_SCHEMA.names


KINDS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
VALUES = [0.0, 1.0, -3.5, 60_000.0, -60_000.0, 3e38, -3e38, float("inf"), float("-inf"), float("nan")]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.lists(st.sampled_from(VALUES), max_size=40))
def test_finite_is_what_isfinite_says(dtype: torch.dtype, values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=dtype)
    assert all_finite(tensor) == bool(tensor.isfinite().all())
    assert all_finite(torch.full((1000,), 60_000.0, dtype=torch.float16))  # whose sum overflows
    assert all_finite(torch.tensor([1, 2]))
