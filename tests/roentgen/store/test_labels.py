"""Labels added after a rollout was stored, read by this package and by readers written from the document alone."""

import tarfile
from pathlib import Path

import pytest

from roentgen.store import Session, StoreError, StoreWriter, verify
from roentgen.store.files import session_files, tar_session
from roentgen.store.labels import LabelChanges
from roentgen.store.merging import compact, remove_unused
from roentgen.store.pulling import pull
from roentgen.store.sessions import delete_session
from tests.roentgen.store.conftest import RolloutFactory


@pytest.fixture
def ids(tmp_path: Path, rollout: RolloutFactory) -> list[str]:
    """Three rollouts of the session `s`."""
    written = [rollout(n, 3, problem=f"p{n}") for n in (1, 2, 3)]
    with StoreWriter(tmp_path, max_wait_s=0, merge_shards=0) as writer:
        for one in written:
            writer.submit(one).result()
    return [one.rollout_id for one in written]


def labels(folder: Path, session: Session | None = None) -> dict[str, dict[str, object]]:
    frame = (session or Session.open(folder / "s")).rollouts(columns=("labels",))
    return dict(zip(frame["rollout_id"], frame["labels"], strict=True))


def test_labels_are_added_once_and_the_latest_counts(tmp_path: Path, ids: list[str]) -> None:
    session = Session.open(tmp_path / "s")
    before = labels(tmp_path)
    scores = {ids[0]: {"match": 1.0, "note": None}, ids[1]: {"match": 0.0}, "01NOBODY": {"match": 1.0}}
    assert session.add_labels(scores) == LabelChanges(2, 0, ("01NOBODY",))
    assert session.add_labels(scores) == LabelChanges(0, 2, ("01NOBODY",))
    assert len([*(tmp_path / "s/labels").iterdir()]) == 1
    assert session.add_labels({ids[0]: {"match": 0.5}, ids[1]: {"match": 0.0}}) == LabelChanges(1, 1)
    found = labels(tmp_path, session)
    assert found == labels(tmp_path)  # also of a session that was open before
    assert found[ids[0]] == {**before[ids[0]], "match": 0.5, "note": None}
    assert found[ids[1]] == {**before[ids[1]], "match": 0.0}
    assert found[ids[2]] == before[ids[2]]
    (some,) = session.rollouts(columns=("labels",), ids=[ids[0]])["labels"]
    assert some["match"] == 0.5


def test_one_is_not_true_and_a_float_is_no_integer(tmp_path: Path, ids: list[str]) -> None:
    session = Session.open(tmp_path / "s")
    for value in (1, True, 1.0, "1"):
        assert session.add_labels({ids[0]: {"x": value}}).changed == 1
        assert type(labels(tmp_path)[ids[0]]["x"]) is type(value)


def test_they_stay_when_shards_are_merged_and_garbage_goes(tmp_path: Path, ids: list[str]) -> None:
    Session.open(tmp_path / "s").add_labels({one: {"match": 1.0} for one in ids})
    (tmp_path / "s/labels/.half.tmp").write_bytes(b"half")
    assert compact(Session.open(tmp_path / "s")).replaced == 3
    gone = remove_unused(Session.open(tmp_path / "s"), grace_s=0).files
    assert "labels/.half.tmp" in gone
    assert {one["match"] for one in labels(tmp_path).values()} == {1.0}
    assert verify(Session.open(tmp_path / "s")).ok


def test_they_go_where_the_session_goes(tmp_path: Path, ids: list[str]) -> None:
    session = Session.open(tmp_path / "s")
    session.add_labels({ids[0]: {"match": 1.0}})
    (name,) = [entry.name for entry in session_files(session) if entry.name.startswith("labels/")]
    size, pieces = tar_session(session)
    (tmp_path / "s.tar").write_bytes(b"".join(pieces))
    with tarfile.open(tmp_path / "s.tar") as archive:
        assert f"s/{name}" in archive.getnames()
    assert (tmp_path / "s.tar").stat().st_size == size
    pull(session.uri, str(tmp_path / "copy"))
    session.add_labels({ids[1]: {"match": 0.0}})
    pull(session.uri, str(tmp_path / "copy"))
    assert labels(tmp_path / "copy") == labels(tmp_path)
    pull(session.uri, str(tmp_path / "texts"), shards=False)
    assert labels(tmp_path / "texts") == labels(tmp_path)
    assert not (tmp_path / "texts/s/shards").exists()
    delete_session(tmp_path, "s")
    assert not (tmp_path / "s").exists()


def test_what_is_no_label_is_refused(tmp_path: Path, ids: list[str]) -> None:
    session = Session.open(tmp_path / "s")
    for value in ([1], float("nan"), "\ud83d"):
        with pytest.raises(StoreError, match=f"labels of rollout {ids[0]}: 'x': "):
            session.add_labels({ids[0]: {"x": value}})
    assert not (tmp_path / "s/labels").exists()


def test_a_damaged_file_is_named(tmp_path: Path, ids: list[str]) -> None:
    Session.open(tmp_path / "s").add_labels({ids[0]: {"match": 1.0}})
    (file,) = (tmp_path / "s/labels").iterdir()
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(StoreError, match=file.name):
        labels(tmp_path)
    (damage,) = verify(Session.open(tmp_path / "s")).damage
    assert damage.file == f"labels/{file.name}"
