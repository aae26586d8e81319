"""A session's table has what the store's reader finds: after retries, labels that came later, and merges."""

from pathlib import Path

import pytest

from roentgen.store import Session, StoreWriter
from roentgen.store.merging import compact
from roentgen.view.session_table import SessionTable
from tests.roentgen.store.conftest import RolloutFactory


def write(store: Path, rollouts: RolloutFactory, *problems: str) -> None:
    with StoreWriter(store, max_wait_s=0.01, merge_shards=0) as writer:
        for problem in problems:
            writer.submit(rollouts(problem=problem)).result()


def shown(table: SessionTable) -> list[tuple[str, object, object]]:
    table.refresh()
    return [(row["sample_id"], row["problem"], row.get("labels.grade")) for row in table.page(0, 100)["rows"]]


def stored(session: Session) -> list[tuple[str, object, object]]:
    frame = session.rollouts()
    return [(row["rollout_id"], row["problem_id"], row["labels"].get("grade")) for row in frame.to_dict("records")]


@pytest.mark.parametrize("kept", [True, False], ids=["one table", "a new table each time"])
def test_it_agrees_with_the_reader(tmp_path: Path, kept: bool) -> None:
    rollouts, store = RolloutFactory(), tmp_path / "store"
    write(store, rollouts, "one", "two", "one", "three")
    session = Session.open(store / "s")
    files = iter(range(100))
    own = SessionTable(tmp_path / "table.duckdb", session)

    def now() -> list[tuple[str, object, object]]:
        return shown(own if kept else SessionTable(tmp_path / f"{next(files)}.duckdb", session))

    assert [problem for _, problem, _ in now()] == ["two", "one", "three"]
    assert now() == stored(session)
    first = now()[0][0]
    session.add_labels({first: {"grade": 3}})
    assert now() == stored(session)
    assert now()[0][2] == 3
    write(store, rollouts, "two", "four")  # the second is tried again: its label goes with the first attempt
    assert now() == stored(session)
    session.add_labels({now()[-1][0]: {"grade": 5}})
    compact(session)
    assert now() == stored(session)
    write(store, rollouts, "four", "five")
    assert now() == stored(session)
    assert [problem for _, problem, _ in now()] == ["one", "three", "two", "four", "five"]


def test_texts_and_index_rows_are_found_in_their_files(tmp_path: Path) -> None:
    rollouts, store = RolloutFactory(), tmp_path / "store"
    write(store, rollouts, "one", "two")
    session = Session.open(store / "s")
    table = SessionTable(tmp_path / "table.duckdb", session)
    table.refresh()
    frame = session.rollouts()
    assert table.page(0, 10, q="XXXX")["matched"] == 2
    assert table.page(0, 10, q="x.x")["matched"] == 0  # it is a text and no pattern
    for row in frame.to_dict("records"):
        found = table.index_row(row["rollout_id"])
        assert (found["text"], found["token_ids"]) == (row["text"], row["token_ids"].tolist())


def test_a_table_that_another_process_holds_is_made_in_memory(tmp_path: Path) -> None:
    import subprocess
    import sys

    write(tmp_path / "store", RolloutFactory(), "one")
    session, file = Session.open(tmp_path / "store" / "s"), tmp_path / "table.duckdb"
    code = f"import duckdb, sys; held = duckdb.connect({str(file)!r}); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        assert [problem for _, problem, _ in shown(SessionTable(file, session))] == ["one"]
        other.communicate(b"")
