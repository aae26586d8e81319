"""Written data is read back: by us, by safetensors and pandas alone, during writes, and after damage."""

import json
import threading
import tracemalloc
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roentgen.contract import ActivationRequest, Positions, RolloutKey, labels_to_json
from roentgen.store import Session, StoreError, StoreWriter, list_sessions, verify
from roentgen.store.merging import compact
from roentgen.store.schema import INDEX_SCHEMA, UnstorableError, index_table, read_labels
from roentgen.store.storage_backends import _RangedFile
from roentgen.tokenized_text import Segment
from tests.roentgen.store.conftest import KEYS, RolloutFactory, spoil_labels


def index_file(store: Path) -> Path:
    """Return the one index file of session "s"."""
    (file,) = (store / "s/index").iterdir()
    return file


def test_rows_come_back_as_written(store: str, rollout: RolloutFactory) -> None:
    written = [rollout(n_prompt=n, n_completion=5 - n % 3) for n in range(1, 9)]
    with StoreWriter(store) as writer:
        receipts = [future.result() for future in [writer.submit(r) for r in written]]
    session = Session.open(receipts[0].uri)
    frame = session.rollouts().set_index("rollout_id")
    for key in KEYS:
        read = {item.rollout_id: item for item in session.activations(key)}
        for original, receipt in zip(written, receipts, strict=True):
            item = read[original.rollout_id]
            assert torch.equal(item.values, original.tensors[key])
            assert item.values.dtype == torch.bfloat16
            assert receipt.row_stop - receipt.row_start == original.sequence.n_rows
            row = frame.loc[original.rollout_id]
            assert (row["n_prompt"], row["n_completion"]) == (
                original.sequence.n_prompt,
                original.sequence.n_completion,
            )
            assert list(row["token_ids"]) == original.sequence.token_ids
            assert row["final_token"] == original.sequence.token_ids[-1]


def test_a_stranger_can_read_it(tmp_path: Path, rollout: RolloutFactory) -> None:
    """safetensors and pandas are enough: no Roentgen."""
    with StoreWriter(tmp_path) as writer:
        original = rollout()
        receipt = writer.submit(original).result()
    shard = safetensors.torch.load_file(tmp_path / "s" / receipt.shard)
    index = pd.read_parquet(tmp_path / "s" / "index")
    row = index.iloc[0]
    rows = slice(row["row_start"], row["row_stop"])
    assert torch.equal(shard[KEYS[0]][rows], original.tensors[KEYS[0]])
    assert shard["token_id"][rows].tolist() == original.sequence.token_ids[:-1]
    assert shard["generated"][rows].tolist() == [0, 0, 0, 0, 1, 1]
    assert np.isnan(shard["logprob"][rows].numpy()).tolist() == [True] * 4 + [False] * 2
    assert json.loads((tmp_path / "s" / "session.json").read_text())["name"] == "s"


def test_one_group_is_one_shard_per_spec(store: str, rollout: RolloutFactory) -> None:
    with StoreWriter(store, max_wait_s=5) as writer:
        futures = [writer.submit(rollout(positions=p)) for p in ["all", "all", "last_prompt", "all"]]
    shards = {f.result().shard for f in futures}
    assert len(shards) == 2
    assert verify(Session.open(f"{store}/s")).rollouts == 4


def test_company_is_waited_for_while_it_is_expected(store: str, rollout: RolloutFactory) -> None:
    """A minute's wait, which ends when no more rollouts are being made."""
    expecting = threading.Event()
    expecting.set()
    with StoreWriter(store, max_wait_s=60, expecting=expecting.is_set) as writer:
        early = writer.submit(rollout())
        with pytest.raises(TimeoutError):
            early.result(timeout=0.2)
        expecting.clear()
        assert early.result(timeout=30).row_stop == writer.submit(rollout()).result(timeout=30).row_stop


def test_position_policies_are_read_from_full_rows(store: str, rollout: RolloutFactory) -> None:
    original = rollout(n_prompt=4, n_completion=4)
    with StoreWriter(store) as writer:
        writer.submit(original).result()
    session, rows = Session.open(f"{store}/s"), original.tensors[KEYS[0]]
    expected = {
        "prompt": rows[:4],
        "generated": rows[4:],
        "last_prompt": rows[3:4],
        "last": rows[-1:],
        "stride:3": rows[::3],
        "mean_generated": rows[4:].float().mean(0, keepdim=True),
    }
    for policy, values in expected.items():
        assert torch.equal(session.activations(KEYS[0], positions=policy)[0].values, values), policy
    assert session.activations(KEYS[0], positions="last").stack().shape == (1, 8)
    with pytest.raises(StoreError, match=r"stack\(\) needs one"):
        session.activations(KEYS[0]).stack()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5)), min_size=1, max_size=6),
    st.sampled_from(["all", "prompt", "generated", "last_prompt", "last", "stride:2", "stride:3"]),
    st.sampled_from(["all", "prompt", "generated", "last_prompt", "last", "stride:2", "stride:6", "mean_prompt"]),
    st.randoms(use_true_random=False),
)
def test_any_positions_are_read_from_any_that_hold_them(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, int]], stored: str, asked: str, dice: Random
) -> None:
    """Against rows chosen one by one; and rows read together are the rows read one by one."""
    root, make = tmp_path_factory.mktemp("store"), RolloutFactory()
    made = [make(*shape, positions=stored) for shape in shapes]
    with StoreWriter(root, max_wait_s=0) as writer:
        for one in made:
            writer.submit(one)
    session = Session.open(root / "s")
    frame = session.rollouts().sample(frac=1, random_state=dice.randrange(1000))
    read = session.activations(KEYS[0], where=frame, positions=asked)
    expected = {}
    for one in made:
        n_rows = one.sequence.n_rows
        wanted = (
            list(one.position) if asked == "all" else list(Positions.parse(asked).select(one.sequence.n_prompt, n_rows))
        )
        if set(wanted) <= set(one.position):
            values = torch.stack(
                [one.tensors[KEYS[0]][list(one.position).index(at)] for at in wanted] or [torch.empty(0)]
            )
            expected[one.rollout_id] = values.float().mean(0, keepdim=True) if asked.startswith("mean") else values
    if len(expected) < len(made):
        with pytest.raises(StoreError, match="cannot be read from them"):
            list(read)
        return
    items = list(read)
    assert [item.rollout_id for item in items] == list(frame["rollout_id"])
    for item in items:
        wanted = expected[item.rollout_id]
        assert torch.equal(item.values.flatten(), wanted.flatten())
    if all(len(item.values) == 1 for item in items):
        assert torch.equal(read.stack(), torch.cat([item.values for item in items]))
    else:
        with pytest.raises(StoreError, match="stack"):
            read.stack()


def test_what_was_not_stored_cannot_be_read(store: str, rollout: RolloutFactory) -> None:
    with StoreWriter(store) as writer:
        writer.submit(rollout(positions="last_prompt")).result()
    session = Session.open(f"{store}/s")
    assert session.activations(KEYS[0], positions="last_prompt")[0].position.tolist() == [3]
    with pytest.raises(StoreError, match="stores positions 'last_prompt'"):
        session.activations(KEYS[0], positions="generated")[0]
    with pytest.raises(StoreError, match="was not captured"):
        session.activations("layers.9.resid_post")[0]


def test_a_retried_rollout_counts_once(store: str, rollout: RolloutFactory) -> None:
    first, again = rollout(problem="p1"), rollout(problem="p1")
    with StoreWriter(store) as writer:
        for r in (first, rollout(problem="p2"), again, rollout(), rollout()):
            writer.submit(r).result()
    session = Session.open(f"{store}/s")
    assert len(session.rollouts(unique=False)) == 5
    unique = session.rollouts()
    assert len(unique) == 4  # p1 once, p2, and two without a key
    assert again.rollout_id in set(unique["rollout_id"])
    # What was counted out is still there for whoever asks for it by id.
    everything = session.rollouts(unique=False)
    assert len(session.activations(KEYS[0], where=everything[everything.rollout_id == first.rollout_id])) == 1


def test_some_rollouts_are_found_by_id(store: str, rollout: RolloutFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roentgen.store.index.ROW_GROUP", 3)
    written = [rollout(problem=f"p{n // 2}") for n in range(10)]
    with StoreWriter(store, max_wait_s=5) as writer:
        for one in written[:8]:
            writer.submit(one)
    with StoreWriter(store) as writer:
        for one in written[8:]:
            writer.submit(one).result()
    session = Session.open(f"{store}/s")
    wanted = [written[9].rollout_id, written[2].rollout_id, "01AAAAAAAAAAAAAAAAAAAAAAAA"]
    frame = session.rollouts(ids=wanted)
    assert sorted(frame["rollout_id"]) == sorted(wanted[:2])  # also the one that was retried
    assert frame.set_index("rollout_id").loc[wanted[0], "labels"] == {"problem": "p4"}
    assert list(frame.columns) == list(session.rollouts().columns)
    (item,) = session.activations(KEYS[1], where=session.rollouts(ids=wanted[1:2], columns=()))
    assert torch.equal(item.values, written[2].tensors[KEYS[1]])
    assert len(session.rollouts(ids=[])) == 0


@pytest.mark.parametrize("store", ["bucket"], indirect=True)
@pytest.mark.parametrize("policy", ["all", "last_prompt", "mean_generated", "stride:3"])
def test_neighbours_are_asked_of_a_bucket_together(
    store: str, rollout: RolloutFactory, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is left out and however it is ordered, and however many requests it takes."""
    written = [rollout(n_prompt=2 + n, n_completion=4) for n in range(20)]
    with StoreWriter(store, max_wait_s=5) as writer:
        for one in written:
            writer.submit(one)
    session = Session.open(f"{store}/s")
    everything = session.rollouts()
    expected = [session.activations(KEYS[0], positions=policy)[n] for n in range(len(everything))]

    reads: list[int] = []
    read = _RangedFile.read

    def counted(file: _RangedFile, at: int, size: int) -> Any:
        reads.append(size)
        return read(file, at, size)

    monkeypatch.setattr(_RangedFile, "read", counted)
    for chosen in (list(range(20)), [*range(12), *range(15, 20)], [3, 2, 1, 7, 8, 9]):
        reads.clear()
        found = list(session.activations(KEYS[0], where=everything.iloc[chosen], positions=policy))
        assert [item.rollout_id for item in found] == list(everything["rollout_id"].iloc[chosen])
        for n, item in zip(chosen, found, strict=True):
            assert torch.equal(item.values, expected[n].values)
            assert item.position.tolist() == expected[n].position.tolist()
        assert len(reads) == 1 + (np.diff(chosen) != 1).sum()


def test_an_open_session_sees_new_commits(store: str, rollout: RolloutFactory) -> None:
    with StoreWriter(store) as writer:
        writer.submit(rollout()).result()
        session = Session.open(f"{store}/s")
        assert len(session.rollouts()) == 1
        writer.submit(rollout()).result()
        assert len(session.rollouts()) == 2


def test_many_writers_need_no_coordination(store: str, rollout: RolloutFactory) -> None:
    def write() -> None:
        with StoreWriter(store, max_wait_s=0.01) as writer:
            for _ in range(10):
                writer.submit(rollout()).result()

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report = verify(Session.open(f"{store}/s"))
    assert (report.rollouts, report.damage, report.orphans) == (40, [], [])


def test_verify_finds_a_flipped_byte(tmp_path: Path, rollout: RolloutFactory) -> None:
    with StoreWriter(tmp_path, max_wait_s=5) as writer:
        futures = [writer.submit(rollout()) for _ in range(3)]
    shard = tmp_path / "s" / futures[0].result().shard
    body = bytearray(shard.read_bytes())
    body[-1] ^= 1
    shard.write_bytes(body)
    report = verify(Session.open(tmp_path / "s"))
    assert not report.ok
    assert report.rollouts == 2
    assert "checksum" in report.damage[0].what


def test_verify_finds_a_torn_and_a_missing_shard(tmp_path: Path, rollout: RolloutFactory) -> None:
    with StoreWriter(tmp_path) as writer:
        torn, gone = writer.submit(rollout()).result(), writer.submit(rollout(positions="last")).result()
    path = tmp_path / "s" / torn.shard
    path.write_bytes(path.read_bytes()[:-20])
    (tmp_path / "s" / gone.shard).unlink()
    found = {d.rollout_id: d.what for d in verify(Session.open(tmp_path / "s")).damage}
    assert "damaged" in found[torn.rollout_id]
    assert "missing" in found[gone.rollout_id]


def test_a_damaged_index_is_named(tmp_path: Path, rollout: RolloutFactory) -> None:
    with StoreWriter(tmp_path) as writer:
        writer.submit(rollout()).result()
    session, index = Session.open(tmp_path / "s"), index_file(tmp_path)
    body = bytearray(index.read_bytes())
    body[len(body) // 3] ^= 0xFF
    index.write_bytes(body)
    assert [d.file for d in verify(session).damage] == [f"index/{index.name}"]
    with pytest.raises(StoreError, match=index.name):
        session.rollouts()


def test_an_orphan_shard_is_invisible(tmp_path: Path, rollout: RolloutFactory) -> None:
    with StoreWriter(tmp_path) as writer:
        receipt = writer.submit(rollout()).result()
    session = Session.open(tmp_path / "s")
    index_file(tmp_path).unlink()
    assert len(session.rollouts()) == 0
    assert verify(session).orphans == [receipt.shard]


def test_a_failed_commit_fails_its_rollouts_and_no_others(tmp_path: Path, rollout: RolloutFactory) -> None:
    with StoreWriter(tmp_path) as writer:
        writer.submit(rollout()).result()
        (tmp_path / "blocked").write_text("a file where the session's folder should be")
        with pytest.raises(OSError, match="blocked"):
            writer.submit(rollout(session="blocked")).result()
        writer.submit(rollout()).result()
    assert verify(Session.open(tmp_path / "s")).rollouts == 2
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_store_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="not writable"):
        StoreWriter(tmp_path / "file" / "store")


def test_a_newer_schema_is_refused(tmp_path: Path, rollout: RolloutFactory) -> None:
    with StoreWriter(tmp_path) as writer:
        writer.submit(rollout()).result()
    session = Session.open(tmp_path / "s")
    table = pq.read_table(index_file(tmp_path))
    pq.write_table(table.replace_schema_metadata({"roentgen_schema": "99"}), index_file(tmp_path))
    with pytest.raises(StoreError, match="schema 99"):
        session.rollouts()


def test_there_is_no_room_while_too_much_is_pending(tmp_path: Path, rollout: RolloutFactory) -> None:
    with StoreWriter(tmp_path, max_wait_s=0.3, max_pending_bytes=2 * rollout().in_memory) as writer:
        assert writer.wait_for_room(0)
        first = writer.submit(rollout())
        assert writer.has_room
        writer.submit(rollout())
        assert not writer.wait_for_room(0)
        assert writer.wait_for_room()
        assert first.done()  # there was room again only because it is on the disk


def test_what_waits_takes_no_more_memory_than_is_counted(rollout: RolloutFactory) -> None:
    """Of small rollouts most is Python's objects; were they not counted, a million would wait within the bound."""
    tracemalloc.start()
    waiting = [(rollout(n_prompt=40, n_completion=40), Future[None]()) for _ in range(500)]
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    counted = sum(one.in_memory for one, _ in waiting)
    outside = sum(one.nbytes for one, _ in waiting)  # torch's own memory is not traced
    assert taken + outside < counted < 4 * (taken + outside)


def test_sessions_are_summarised(store: str, rollout: RolloutFactory) -> None:
    assert list_sessions(f"{store}/none") == []
    with StoreWriter(store) as writer:
        for name in ("b", "a"):
            writer.submit(rollout(session=name)).result()
    summaries = list_sessions(store)
    assert [s.session_id for s in summaries] == ["a", "b"]
    assert summaries[0].tokens == 6
    assert summaries[0].keys == list(KEYS)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 6), st.sampled_from(["all", "generated", "stride:2"])),
        min_size=1,
        max_size=8,
    )
)
def test_any_mix_of_rollouts_comes_back(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, int, str]]
) -> None:
    root = tmp_path_factory.mktemp("store")
    make = RolloutFactory()
    written = {r.rollout_id: r for r in (make(p, c, positions=policy) for p, c, policy in shapes)}
    with StoreWriter(root, max_wait_s=0) as writer:
        futures = [writer.submit(r) for r in written.values()]
    assert {future.result().rollout_id for future in futures} == set(written)
    session = Session.open(root / "s")
    assert verify(session).rollouts == len(written)
    for item in session.activations(KEYS[1]):
        assert torch.equal(item.values, written[item.rollout_id].tensors[KEYS[1]])
        assert item.position.tolist() == written[item.rollout_id].position.tolist()


EXTREMES: dict[str, object] = {
    "": "",
    "nul\0": "a\0b",
    "wide": "\U0001f600é\u202e",
    "max": 2**63 - 1,
    "min": -(2**63),
    "beyond": 2**70,
    "large": 1e308,
    "small": 5e-324,
    "sum": 0.1 + 0.2,
    "minus": -0.0,
    "true": True,
    "none": None,
    "long": "x" * 500_000,
}


def test_the_contracts_bounds_are_what_the_index_holds(tmp_path: Path, rollout: RolloutFactory) -> None:
    """The greatest that a request may say is stored, merged and read exactly, beside a rollout that says nothing."""
    key = RolloutKey(
        config_hash="\U0001f600" * 64, problem_id="\0é\ufffe\U0010ffff" * 50, epoch=2**31 - 1, turn=2**31 - 1
    )
    labels = ActivationRequest.model_validate({"labels": EXTREMES}).labels
    written = [replace(rollout(), key=key, labels=labels), replace(rollout(), labels={"max": "a text", "none": 1.5})]
    for one in written:  # each in a shard of its own
        with StoreWriter(tmp_path) as writer:
            writer.submit(one).result()
    session = Session.open(tmp_path / "s")
    for _ in range(2):
        first, second = session.rollouts().to_dict("records")
        assert RolloutKey(**{name: first[name] for name in RolloutKey.model_fields}) == key
        assert repr(sorted(first["labels"].items())) == repr(sorted(EXTREMES.items()))
        assert second["labels"] == {"max": "a text", "none": 1.5}
        assert compact(session).replaced in (0, 2)
    assert verify(session).rollouts == 2


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(
        st.text(),
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    )
)
def test_any_labels_come_back_exactly(labels: dict[str, object]) -> None:
    accepted = ActivationRequest.model_validate({"labels": labels}).labels
    table = index_table([dict.fromkeys(INDEX_SCHEMA.names) | {"labels": labels_to_json(accepted)}])
    (read,) = table.column("labels").to_pylist()
    assert repr(sorted(read_labels(read).items())) == repr(sorted(labels.items()))


def beyond(**key: object) -> dict[str, object]:
    """Return a change to a rollout that the contract does not let through."""
    whole: dict[str, Any] = {"config_hash": "c", "problem_id": "p", "epoch": 1, "turn": 0, **key}
    return {"key": RolloutKey.model_construct(**whole)}


def said(**change: object) -> dict[str, object]:
    """Return a change to what a rollout says."""
    return {"sequence": replace(RolloutFactory()().sequence, **change)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (beyond(turn=2**31), "turn"),
        (beyond(epoch=2**63), "epoch"),
        (beyond(problem_id="\ud83d"), "problem_id"),
        (beyond(turn=True), "turn"),
        ({"labels": {"a": float("nan")}}, "labels"),
        ({"labels": {"a": {1, 2}}}, "labels"),
        (said(text="half \ud83d"), "text"),
        (said(token_ids=[2**31] * 7), "token_ids"),
        (said(segments=[Segment("\udc00", 0, 1)]), "segments"),
    ],
)
def test_a_rollout_that_cannot_be_stored_fails_alone(
    tmp_path: Path, rollout: RolloutFactory, change: dict[str, object], words: str
) -> None:
    good = [rollout(problem=f"p{i}") for i in range(9)]
    with StoreWriter(tmp_path, max_wait_s=5, merge_shards=0) as writer:
        futures = [writer.submit(one) for one in good[:6]]
        bad = [writer.submit(replace(rollout(), **change)) for _ in range(2)]
        futures += [writer.submit(one) for one in good[6:]]
    for future in bad:
        with pytest.raises(UnstorableError, match=f"^{words}: "):
            future.result()
    session = Session.open(tmp_path / "s")
    assert {future.result().rollout_id for future in futures} == {one.rollout_id for one in good}
    assert set(session.rollouts()["rollout_id"]) == {one.rollout_id for one in good}
    report = verify(session)
    assert (report.rollouts, report.damage, report.orphans) == (9, [], [])


def test_a_group_whose_rollouts_can_all_be_stored_is_one_shard(tmp_path: Path, rollout: RolloutFactory) -> None:
    with StoreWriter(tmp_path, max_wait_s=5) as writer:
        futures = [writer.submit(rollout()) for _ in range(9)]
    assert len({future.result().shard for future in futures}) == 1


def test_labels_that_an_older_version_let_in_can_be_read(tmp_path: Path, rollout: RolloutFactory) -> None:
    with StoreWriter(tmp_path) as writer:
        writer.submit(replace(rollout(), labels={"a": 1})).result()
    spoil_labels(tmp_path, '{"a\\ud83d": "half \\ud83d!", "b": NaN, "c": "\\ud83d\\ude00"}')
    (labels,) = Session.open(tmp_path / "s").rollouts()["labels"]
    assert {**labels, "b": None} == {"a\ufffd": "half \ufffd!", "b": None, "c": "\U0001f600"}
