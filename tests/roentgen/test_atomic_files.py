"""Files are written atomically and flushed in order; bytes arrive as given, through the page cache and past it."""

import errno
import os
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roentgen import atomic_files
from roentgen.atomic_files import BUFFER_BYTES, write_chunks, write_json
from tests.disk import DiskCalls

SMALL = 8192


def test_a_file_gets_its_name_between_two_flushes(tmp_path: Path, disk_calls: DiskCalls) -> None:
    write_json(tmp_path / "config.json", {"a": "é"})
    assert (tmp_path / "config.json").read_text(encoding="utf-8") == '{\n  "a": "é"\n}\n'
    disk_calls.check_atomic(tmp_path / "config.json")


@pytest.mark.parametrize("broken", ["fsync", "rename"])
def test_a_failing_disk_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    path = tmp_path / "config.json"
    write_json(path, {"old": True})
    whole = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"new": True})
    assert path.read_bytes() == whole
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"new": float("nan")})
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


@given(sizes=st.lists(st.integers(0, 3 * SMALL), max_size=8), seed=st.integers(0, 100))
@settings(max_examples=200, deadline=None)
def test_any_chunks_are_written_in_order(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], seed: int) -> None:
    path = tmp_path_factory.getbasetemp() / "chunks"
    chunks = [Random(f"{seed} {number}").randbytes(size) for number, size in enumerate(sizes)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(atomic_files, "BUFFER_BYTES", SMALL)
        write_chunks(path, iter(chunks))
    assert path.read_bytes() == b"".join(chunks)


@pytest.mark.parametrize("size", [BUFFER_BYTES - 1, BUFFER_BYTES, BUFFER_BYTES + 1, 2 * BUFFER_BYTES + 4097])
def test_sizes_around_that_of_the_buffer(tmp_path: Path, size: int) -> None:
    data = Random(size).randbytes(size)
    write_chunks(tmp_path / "whole", [data])
    assert (tmp_path / "whole").read_bytes() == data


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system writes nothing past the page cache")
def test_only_what_is_large_goes_past_the_page_cache(tmp_path: Path) -> None:
    try:
        os.close(os.open(tmp_path / "tried", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system writes nothing past the page cache")
    for name, size in [("small", BUFFER_BYTES // 2), ("large", 4 * BUFFER_BYTES)]:
        write_chunks(tmp_path / name, [bytes(size)])
        with (tmp_path / name).open("rb") as file:
            os.fsync(file.fileno())
    assert _cached(tmp_path / "small")
    assert not _cached(tmp_path / "large")


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system writes nothing past the page cache")
def test_a_file_system_that_cannot_is_written_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One refuses to be asked, another refuses the write: both are told by EINVAL."""
    data = Random(0).randbytes(2 * BUFFER_BYTES + 5)
    monkeypatch.setattr(atomic_files, "_ALIGNED", 1)  # so that the kernel itself refuses the last, odd write
    write_chunks(tmp_path / "refused late", [data])
    assert (tmp_path / "refused late").read_bytes() == data

    ask = atomic_files.fcntl.fcntl

    def refuse(file: int, command: int, flags: int = 0) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return ask(file, command, flags)

    monkeypatch.setattr(atomic_files.fcntl, "fcntl", refuse)
    write_chunks(tmp_path / "refused", [data])
    assert (tmp_path / "refused").read_bytes() == data


def _cached(path: Path) -> bool:
    """Whether a file's first bytes can be had without waiting for the disk."""
    with path.open("rb") as file:
        try:
            return os.preadv(file.fileno(), [bytearray(16)], 0, os.RWF_NOWAIT) == 16
        except BlockingIOError:
            return False
