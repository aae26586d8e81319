"""A pull copies a complete session, resumes after interruptions, and never exposes a partial one."""

from pathlib import Path

import pytest
import torch

from roentgen.store import Session, StoreError, StoreWriter, verify
from roentgen.store.files import is_session_file
from roentgen.store.pulling import pull
from tests.roentgen.store.conftest import KEYS, RolloutFactory


def test_a_pull_goes_on_where_it_stopped(store: str, rollout: RolloutFactory, tmp_path: Path) -> None:
    made = [rollout() for _ in range(4)]
    with StoreWriter(store, max_wait_s=0) as writer:
        for one in made:
            writer.submit(one).result()
    told: list[tuple[int, int]] = []

    class InterruptedPullError(Exception):
        pass

    def interrupt(done: int, size: int) -> None:
        told.append((done, size))
        if len(told) == 3:
            raise InterruptedPullError

    here = tmp_path / "here"
    with pytest.raises(InterruptedPullError):
        pull(f"{store}/s", str(here), on_progress=interrupt)
    assert len(Session.open(here / "s").rollouts()) == 0  # shards without an index
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*") if path.is_file()}
    assert len(before) == 3
    uri = pull(f"{store}/s", str(here))
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    session = Session.open(uri)
    assert (verify(session).rollouts, verify(session).ok) == (4, True)
    read = {item.rollout_id: item.values for item in session.activations(KEYS[0])}
    assert all(torch.equal(read[one.rollout_id], one.tensors[KEYS[0]]) for one in made)
    assert told[-1][1] == sum(path.stat().st_size for path in here.rglob("*") if path.is_file())


def test_what_cannot_be_pulled_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is not a session"):
        pull(str(tmp_path / "none"), str(tmp_path / "here"))
    with pytest.raises(StoreError, match=r"is not a session of a server: .*/session/x/files fails: .*refused"):
        pull("http://127.0.0.1:9/v1/activations/session/x", str(tmp_path / "here"))


@pytest.mark.parametrize(
    "name", ["../x", "shards/../../x", "index/x.parquet", "shards/.01A.tmp", "", "session.json/x", "/etc/passwd"]
)
def test_other_paths_are_no_session_files(name: str) -> None:
    assert not is_session_file(name)
