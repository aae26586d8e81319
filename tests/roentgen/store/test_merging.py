"""Merging and removal of unused files change the files and never the contents of a session."""

import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roentgen.store import CapturedRollout, Session, StoreError, StoreWriter, verify
from roentgen.store.merging import compact, remove_unused
from roentgen.store.storage_backends import open_folder
from tests.roentgen.store.conftest import KEYS, RolloutFactory


def write(store: str | Path, rollouts: list[CapturedRollout]) -> None:
    """Commit each in a group of its own."""
    with StoreWriter(store, max_wait_s=0, merge_shards=0) as writer:
        for rollout in rollouts:
            writer.submit(rollout).result()


def check(session: Session, rollouts: list[CapturedRollout]) -> None:
    """Compare all that a session holds with what was written."""
    written = {rollout.rollout_id: rollout for rollout in rollouts}
    frame = session.rollouts(unique=False)
    assert sorted(frame["rollout_id"]) == sorted(written)
    for _, row in frame.iterrows():
        assert list(row["token_ids"]) == written[row["rollout_id"]].sequence.token_ids
        assert row["labels"] == written[row["rollout_id"]].labels
    for key in KEYS:
        for item in session.activations(key, where=frame):
            assert torch.equal(item.values, written[item.rollout_id].tensors[key])
            assert item.position.tolist() == written[item.rollout_id].position.tolist()
    report = verify(session)
    assert (report.rollouts, report.damage) == (len(written), [])


def test_many_shards_become_one_per_spec(store: str, rollout: RolloutFactory) -> None:
    written = [rollout(n, 3, positions="last" if n % 3 == 0 else "all", problem=f"p{n % 4}") for n in range(1, 9)]
    write(store, written)
    session = Session.open(f"{store}/s")
    before = session.rollouts(unique=False)
    done = compact(session)
    assert (done.replaced, len(done.moved), len(done.into), done.rollouts, done.dropped) == (8, 8, 2, 8, 0)
    check(session, written)
    assert len(session.shard_files()) == 2
    assert len(session.rollouts()) == 4
    # Whoever held a table from before still reads by it; a session opened anew sees the same.
    read = {item.rollout_id: item.values for item in session.activations(KEYS[0], where=before)}
    assert all(torch.equal(read[r.rollout_id], r.tensors[KEYS[0]]) for r in written)
    check(Session.open(f"{store}/s"), written)
    assert remove_unused(session).files == []  # all of it is young
    gone = remove_unused(session, grace_s=0)
    assert len(gone.files) == 16
    check(Session.open(f"{store}/s"), written)
    assert remove_unused(Session.open(f"{store}/s"), grace_s=0).files == []


def test_a_merge_of_merged_files_leaves_no_trace(tmp_path: Path, rollout: RolloutFactory) -> None:
    written = []
    for _ in range(3):
        written += [rollout(), rollout()]
        write(tmp_path, written[-2:])
        compact(Session.open(tmp_path / "s"))
    session = Session.open(tmp_path / "s")
    check(session, written)
    remove_unused(session, grace_s=0)
    check(session, written)
    assert len(list((tmp_path / "s/index").iterdir())) == len(list((tmp_path / "s/shards").iterdir())) == 1


def test_a_large_shard_is_named_anew_and_not_moved(store: str, rollout: RolloutFactory) -> None:
    large = [rollout(n_prompt=100, d=64) for _ in range(3)]
    small = [rollout() for _ in range(2)]
    write(store, [*large, *small])
    session = Session.open(f"{store}/s")
    before = set(session.rollouts()["shard"])
    done = compact(session, shard_bytes=20_000)
    assert (done.replaced, len(done.moved), len(done.into)) == (5, 2, 1)
    check(session, [*large, *small])
    stayed = before & set(session.rollouts()["shard"])
    assert len(stayed) == 3
    assert all(
        said is not None and said.size > 10_000 for shard, said in session.shard_files().items() if shard in stayed
    )
    remove_unused(session, grace_s=0)
    check(Session.open(f"{store}/s"), [*large, *small])
    assert compact(session, shard_bytes=20_000).replaced == 0
    # A rollout that is not wanted makes its shard small enough to move.
    compact(session, shard_bytes=20_000, drop=[large[0].rollout_id])
    remove_unused(session, grace_s=0)
    check(Session.open(f"{store}/s"), [*large[1:], *small])


def test_what_is_merged_at_once_is_bounded(
    tmp_path: Path, rollout: RolloutFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = [rollout(problem=f"p{n}") for n in range(9)]
    write(tmp_path, written)
    largest = max(path.stat().st_size for path in (tmp_path / "s/index").iterdir())
    monkeypatch.setattr("roentgen.store.merging.INDEX_BYTES", 3 * largest)
    done = compact(Session.open(tmp_path / "s"))
    assert (done.replaced, len(done.indexes), len(done.into)) == (9, 3, 3)
    check(Session.open(tmp_path / "s"), written)


def test_two_merges_at_once_lose_and_double_nothing(tmp_path: Path, rollout: RolloutFactory) -> None:
    written = [rollout() for _ in range(6)]
    write(tmp_path, written)
    sessions = [Session.open(tmp_path / "s") for _ in range(3)]
    threads = [threading.Thread(target=compact, args=(session,)) for session in sessions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check(Session.open(tmp_path / "s"), written)
    remove_unused(Session.open(tmp_path / "s"), grace_s=0)
    check(Session.open(tmp_path / "s"), written)


def test_a_writer_merges_what_it_writes_while_a_reader_reads(tmp_path: Path, rollout: RolloutFactory) -> None:
    written, done = [rollout() for _ in range(64)], threading.Event()

    def write_all() -> None:
        with StoreWriter(tmp_path, max_wait_s=0, merge_shards=8) as writer:
            for one in written:
                writer.submit(one).result()
        done.set()

    write(tmp_path, [first := rollout()])
    session, counts = Session.open(tmp_path / "s"), []
    thread = threading.Thread(target=write_all)
    thread.start()
    while not done.is_set():
        frame = session.rollouts()
        counts.append(len(frame))
        assert all(len(item.values) == 6 for item in session.activations(KEYS[0], where=frame))
    thread.join()
    assert counts == sorted(counts)
    check(session, [first, *written])
    assert len(session.shard_files()) < 20
    remove_unused(session, grace_s=0)
    check(session, [first, *written])


def test_what_is_not_wanted_is_left_out(tmp_path: Path, rollout: RolloutFactory) -> None:
    written = [rollout(problem=f"p{n}") for n in range(5)]
    write(tmp_path, written)
    session = Session.open(tmp_path / "s")
    done = compact(session, drop=[written[n].rollout_id for n in (0, 2, 4)])
    assert done.dropped == 3
    check(session, [written[1], written[3]])
    remove_unused(session, grace_s=0)
    check(Session.open(tmp_path / "s"), [written[1], written[3]])


def test_damage_is_not_merged(tmp_path: Path, rollout: RolloutFactory) -> None:
    write(tmp_path, [rollout(), rollout()])
    shard = min((tmp_path / "s/shards").iterdir())
    body = bytearray(shard.read_bytes())
    body[-1] ^= 1
    shard.write_bytes(body)
    session = Session.open(tmp_path / "s")
    with pytest.raises(StoreError, match="checksum differs; nothing was merged"):
        compact(session)
    assert len(session.index()) == 2
    index = min((tmp_path / "s/index").iterdir())
    index.write_bytes(index.read_bytes()[:-9])
    with pytest.raises(StoreError, match="is damaged"):
        remove_unused(Session.open(tmp_path / "s"), grace_s=0)
    assert len(list((tmp_path / "s/shards").glob("*"))) >= 2


def test_only_garbage_is_collected(tmp_path: Path, rollout: RolloutFactory) -> None:
    written = [rollout() for _ in range(3)]
    write(tmp_path, written)
    folder = tmp_path / "s"
    orphan = folder / "shards/01AAAAAAAAAAAAAAAAAAAAAAAA.safetensors"
    orphan.write_bytes(b"x" * 10)
    young = folder / "shards/01BBBBBBBBBBBBBBBBBBBBBBBB.safetensors"
    young.write_bytes(b"y")
    half = folder / "index/.01A.parquet.123.tmp"
    half.write_bytes(b"z" * 5)
    for old in (orphan, half):
        os.utime(old, (0, 0))
    session = Session.open(folder)
    assert len(remove_unused(session, dry_run=True).files) == 2
    assert orphan.exists()
    gone = remove_unused(session)
    assert (len(gone.files), gone.size) == (2, 15)
    assert not orphan.exists()
    assert not half.exists()
    assert young.exists()
    check(session, written)


STEPS = st.lists(
    st.one_of(st.tuples(st.just("write"), st.integers(1, 3)), st.sampled_from([("compact", 0), ("collect", 0)])),
    max_size=12,
)


@settings(max_examples=25, deadline=None)
@given(STEPS, st.integers(200, 4000))
def test_any_order_of_writing_merging_and_collecting(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]], shard_bytes: int
) -> None:
    root, make = tmp_path_factory.mktemp("store"), RolloutFactory()
    written = [make()]
    write(root, written)
    for step, count in steps:
        session = Session.open(root / "s")
        if step == "write":
            new = [make(count, n + 1) for n in range(count)]
            write(root, new)
            written += new
        elif step == "compact":
            compact(session, shard_bytes=shard_bytes)
        else:
            remove_unused(session, grace_s=0)
        check(session, written)
    check(Session.open(root / "s"), written)
    assert open_folder(root).folders() == ["s"]
