"""Batches contain every row once, in an order determined by the seed and the choice of rollouts, in little memory."""

import gc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roentgen.store import CapturedRollout, Session, StoreError, StoreWriter, batches
from roentgen.store.batches import RowBatch
from roentgen.store.merging import compact
from tests.roentgen.store.conftest import KEYS, RolloutFactory


def write(store: str | Path, rollouts: Sequence[CapturedRollout], shards: int = 1) -> Session:
    """Write rollouts, so many shards of them."""
    for number in range(shards):
        with StoreWriter(store, max_wait_s=60, merge_shards=0) as writer:
            futures = [
                writer.submit(one)
                for one in rollouts[number * len(rollouts) // shards : (number + 1) * len(rollouts) // shards]
            ]
        for future in futures:
            future.result()
    return Session.open(f"{store}/s")


def rows_of(found: Sequence[RowBatch]) -> list[tuple[int, int, bytes]]:
    """Every row as who it is and its bytes."""
    return [
        (int(rollout), int(position), values.numpy().tobytes())
        for batch in found
        for rollout, position, values in zip(batch.rollout, batch.position, batch.values.float(), strict=True)
    ]


def expected(rollouts: Sequence[CapturedRollout], key: str = KEYS[0]) -> list[tuple[int, int, bytes]]:
    return [
        (number, int(position), values.numpy().tobytes())
        for number, one in enumerate(rollouts)
        for position, values in zip(one.position, one.tensors[key].float(), strict=True)
    ]


def tensor_bytes() -> int:
    gc.collect()
    return sum(one.nbytes for one in gc.get_objects() if isinstance(one, torch.Tensor))


LENGTHS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 6)), min_size=1, max_size=8)


@settings(max_examples=25, deadline=None)
@given(
    lengths=LENGTHS, tokens=st.integers(1, 30), seed=st.integers(0, 5), piece=st.integers(1, 200), pool=st.integers(1, 600),
    positions=st.sampled_from(["all", "stride:3", "last"]), shuffle=st.booleans(), shards=st.integers(1, 3),
)  # fmt: skip
def test_every_row_comes_once(
    lengths: list[tuple[int, int]], tokens: int, seed: int, piece: int, pool: int, positions: str, shuffle: bool,
    shards: int, tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    make = RolloutFactory()
    made = [make(*length, positions=positions) for length in lengths]
    session = write(tmp_path_factory.mktemp("s"), made, shards)
    rows = session.activations(KEYS[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "PIECE_BYTES", piece)
        asked = rows.batches(tokens, shuffle=shuffle, seed=seed, pool_bytes=pool)
        found = list(asked)
        again = list(asked)
    total = sum(one.n_rows for one in made)
    assert [len(batch.values) for batch in found] == [tokens] * (total // tokens) + [total % tokens] * (
        total % tokens > 0
    )
    assert len(asked) == len(found)
    seen, wanted = rows_of(found), expected(made)
    assert sorted(seen) == sorted(wanted)
    if not shuffle:
        assert seen == wanted
    assert rows_of(again) == seen


def test_the_seed_decides_and_the_files_do_not(tmp_path: Path, rollout: RolloutFactory) -> None:
    session = write(tmp_path, [rollout(20, 5, problem=f"p{n}") for n in range(30)], shards=5)
    rows = session.activations(KEYS[0])
    first = rows_of(list(rows.batches(64, seed=1)))
    assert first != rows_of(list(rows.batches(64, seed=2)))
    assert first != rows_of(list(rows.batches(64, shuffle=False)))
    compact(session)
    again = Session.open(tmp_path / "s")
    assert len(list((tmp_path / "s/shards").iterdir())) == 6
    assert rows_of(list(again.activations(KEYS[0]).batches(64, seed=1))) == first


def test_positions_and_choices_are_as_elsewhere(store: str, rollout: RolloutFactory) -> None:
    made = [rollout(n, 4, problem=f"p{n}") for n in range(1, 8)]
    session = write(store, made, shards=2)
    frame = session.rollouts().iloc[[5, 0, 3]]
    for positions in ("generated", "last_prompt", "mean_prompt", "mean_generated"):
        rows = session.activations(KEYS[1], where=frame, positions=positions)
        found = list(rows.batches(4, seed=3))
        wanted = [
            (number, int(position), values.numpy().tobytes())
            for number, item in enumerate(rows)
            for position, values in zip(item.position, item.values.float(), strict=True)
        ]
        assert sorted(rows_of(found)) == sorted(wanted)


def test_rollouts_in_another_order_than_their_shard(tmp_path: Path, rollout: RolloutFactory) -> None:
    made = [rollout(100, 1, problem=f"p{n}", d=256) for n in range(6)]
    session = write(tmp_path, made)
    rows = session.activations(KEYS[0], where=session.rollouts().iloc[::-1])
    assert rows_of(list(rows.batches(64, shuffle=False))) == expected(made[::-1])
    assert rows_of(list(rows[2:4].batches(64, shuffle=False))) == expected(made[3:1:-1])


def test_rollouts_without_rows_are_passed_over(tmp_path: Path, rollout: RolloutFactory) -> None:
    session = write(tmp_path, [rollout(3, 1, positions="generated") for _ in range(3)])
    rows = session.activations(KEYS[0])
    assert (len(rows.batches()), list(rows.batches())) == (0, [])
    assert list(rows.batches().tensors(epochs=None)) == []
    assert list(session.activations(KEYS[0], where=session.rollouts().iloc[:0]).batches()) == []


def test_batches_are_from_many_rollouts(
    tmp_path: Path, rollout: RolloutFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "PIECE_BYTES", 256)  # 16 rows: a tenth of a rollout
    session = write(tmp_path, [rollout(150, 11) for _ in range(100)])
    found = list(session.activations(KEYS[0]).batches(400, seed=1, pool_bytes=4000 * 16))
    for batch in found[:-10]:
        assert len(np.unique(batch.rollout)) > 60  # of 100; in order it would be 3
    steps = np.concatenate([np.diff(batch.position) for batch in found])
    assert (steps == 1).mean() < 0.05


def test_tensors_are_what_trainers_take(tmp_path: Path, rollout: RolloutFactory) -> None:
    made = [rollout(10, 3) for _ in range(5)]
    asked = write(tmp_path, made).activations(KEYS[0]).batches(16, seed=7)
    epochs = [rows.tolist() for rows in asked.tensors(epochs=2)]
    half = len(epochs) // 2
    one, two = ([tuple(row) for rows in part for row in rows] for part in (epochs[:half], epochs[half:]))
    assert sorted(one) == sorted(two)
    assert one != two
    assert sorted(one) == sorted(tuple(row.tolist()) for each in made for row in each.tensors[KEYS[0]].float())
    endless = asked.tensors(epochs=None)
    assert {next(endless).dtype for _ in range(20)} == {torch.float32}


def test_memory_is_the_pool(tmp_path: Path, rollout: RolloutFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "PIECE_BYTES", 64 << 10)
    session = write(tmp_path, [rollout(500, 1, d=256, keys=KEYS[:1]) for _ in range(60)])  # 15 MB
    rows = session.activations(KEYS[0])
    before, held = tensor_bytes(), list[int]()
    for number, batch in enumerate(rows.batches(100, pool_bytes=1 << 20)):
        assert batch.values.untyped_storage().nbytes() == batch.values.nbytes
        if number % 100 == 99:
            held.append(tensor_bytes() - before)
    assert max(held) < 6 << 20


def test_what_cannot_be_is_named(tmp_path: Path, rollout: RolloutFactory) -> None:
    session = write(tmp_path, [rollout(positions="last")])
    rows = session.activations(KEYS[0])
    for name in ("tokens", "pool_bytes"):
        with pytest.raises(ValueError, match=f"{name}: 0 is not allowed"):
            rows.batches(**{name: 0})
    with pytest.raises(ValueError, match="seed: -1 is not allowed"):
        rows.batches(seed=-1)
    with pytest.raises(StoreError, match="cannot be read from them"):
        list(session.activations(KEYS[0], positions="prompt").batches())
    with pytest.raises(StoreError, match=r"layers.9.resid_post was not captured"):
        list(session.activations("layers.9.resid_post").batches())
