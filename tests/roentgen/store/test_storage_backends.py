"""A local folder and a bucket behave alike."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from roentgen.store import StoreError
from roentgen.store.storage_backends import check_writable, open_folder


def test_files_are_created_listed_read_and_removed(store: str) -> None:
    folder = open_folder(store)
    inner = folder.child("inner")
    assert (folder.entries(), folder.folders(), inner.entries()) == ([], [], [])
    body = bytes(range(256)) * 40_000  # more than one piece of an upload
    inner.put("b", [body[:100], memoryview(body)[100:]])
    inner.put("a", [b""])
    assert [(entry.name, entry.size) for entry in inner.entries()] == [("a", 0), ("b", len(body))]
    assert all(abs(entry.modified - time.time()) < 60 for entry in inner.entries())
    assert folder.folders() == ["inner"]
    assert (inner.read("a"), inner.read("b")) == (b"", body)
    assert b"".join(bytes(piece) for piece in inner.stream("b")[1]) == body
    assert bytes(inner.open("b").read(255, 3)) == b"\xff\x00\x01"
    inner.remove("b")
    inner.remove("b")
    assert [entry.name for entry in inner.entries()] == ["a"]
    with pytest.raises(FileNotFoundError):
        inner.open("b")
    assert open_folder(inner.uri).read("a") == b""
    assert inner.name == "inner"


def test_a_file_that_cannot_be_made_whole_is_not_there(store: str) -> None:
    def pieces() -> Iterator[bytes]:
        yield bytes(12 << 20)  # more than one piece of an upload
        raise ValueError("the rest does not come")

    folder = open_folder(store)
    with pytest.raises(ValueError, match="does not come"):
        folder.put("a", pieces())
    assert folder.entries() == []


def test_what_is_read_may_be_written_over_and_the_file_stays(store: str) -> None:
    folder = open_folder(store)
    folder.put("a", [b"abc"])
    data = folder.open("a").read(0, 3)
    data[0:1] = b"x"
    assert folder.read("a") == b"abc"


def test_a_writable_store_is_left_as_it_was(store: str) -> None:
    folder = open_folder(store)
    check_writable(folder)
    assert folder.entries() == []


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("http://host/x", "allowed are a folder and addresses that begin with s3://, gs://"),
        ("s3://", "write s3://BUCKET"),
        ("s3://bucket//x", "write s3://BUCKET"),
        ("s3://bucket/../x", "write s3://BUCKET"),
        ("s3://bucket/x?scheme=http", "write s3://BUCKET"),
    ],
)
def test_other_addresses_are_refused(uri: str, said: str) -> None:
    with pytest.raises(StoreError, match=said):
        open_folder(uri)


def test_a_bucket_that_is_not_there_is_named(store: str) -> None:
    if not store.startswith("s3://"):
        pytest.skip("a folder is made")
    with pytest.raises(StoreError, match=r"'s3://no-such-bucket/x' is not writable"):
        check_writable(open_folder("s3://no-such-bucket/x"))


def test_a_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_folder("x").uri == str(tmp_path / "x")
    assert open_folder(f"file://{tmp_path}/x").uri == str(tmp_path / "x")
