"""Whole sessions: deleted only without writers, and archived consistently during writes."""

import io
import tarfile
import time
from pathlib import Path

import pytest

from roentgen.store import Session, SessionBusyError, StoreError, StoreWriter, list_sessions, verify
from roentgen.store.files import session_files, tar_session
from roentgen.store.sessions import delete_session, find_session
from roentgen.store.storage_backends import open_folder
from tests.roentgen.store.conftest import RolloutFactory


def test_a_deleted_session_is_gone_and_its_name_free(store: str, rollout: RolloutFactory) -> None:
    with StoreWriter(store, max_wait_s=0) as writer:
        writer.submit(rollout(session="a")).result()
        writer.submit(rollout(session="b")).result()
        assert delete_session(store, "a") > 0
        assert [s.session_id for s in list_sessions(store)] == ["b"]
        with pytest.raises(StoreError):
            find_session(store, "a")
        writer.submit(rollout(session="a")).result()
    assert len(Session.open(f"{store}/a").rollouts()) == 1
    assert [name for name in open_folder(store).folders() if name != ".locks"] == ["a", "b"]


def test_a_session_with_rollouts_on_their_way_is_not_deleted(store: str, rollout: RolloutFactory) -> None:
    with StoreWriter(store, max_wait_s=0) as writer:
        writer.submit(rollout(session="a")).result()
    with StoreWriter(store, max_wait_s=60) as writer:  # what is submitted waits to be committed
        waiting = writer.submit(rollout(session="a"))
        if store.startswith("s3://"):  # where a note says so, which takes a moment
            while not open_folder(f"{store}/.locks/a").entries():
                time.sleep(0.05)
        with pytest.raises(SessionBusyError, match="is being written"):
            delete_session(store, "a")
        assert not waiting.done()
    assert len(Session.open(f"{store}/a").rollouts()) == 2
    delete_session(store, "a")


@pytest.mark.parametrize("name", ["../x", "*", ".lock", "", "a/b"])
def test_an_unsafe_name_deletes_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(ValueError, match="not a session id"):
        delete_session(tmp_path / "store", name)
    assert (tmp_path / "x").is_dir()


def test_a_packed_session_is_what_was_committed_then(tmp_path: Path, store: str, rollout: RolloutFactory) -> None:
    with StoreWriter(store, max_wait_s=0) as writer:
        for _ in range(3):
            writer.submit(rollout(session="a", n_prompt=700)).result()
        listed = [entry.name for entry in session_files(Session.open(f"{store}/a"))]
        size, pieces = tar_session(Session.open(f"{store}/a"))
        writer.submit(rollout(session="a")).result()  # not in the archive
    packed = b"".join(pieces)
    assert len(packed) == size
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        assert archive.getnames() == [f"a/{name}" for name in listed]
        archive.extractall(tmp_path / "unpacked", filter="data")
    report = verify(Session.open(tmp_path / "unpacked" / "a"))
    assert (report.rollouts, report.ok, report.orphans) == (3, True, [])
