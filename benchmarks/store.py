"""The activation store compared with the bare disk: `python -m benchmarks.store`.

Bandwidth: the same bytes are written and read with only the operating system (or, for a bucket, pyarrow) and through the
store, alternately. Files are dropped from the page cache before they are read, so that the disk is measured. For a bucket,
a server on this machine unless `--bucket` names another, the server dominates.

Scale: a session with many rollouts is written with the store's writer; new processes then open it and report the time and
the memory beyond importing the store.
"""

import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import torch
import typer
from ulid import ULID

from benchmarks.many_rollouts import ASKED, TOKENS, Opened, StoreStep, measure_session
from benchmarks.many_rollouts import WIDTH as WIDTH_OF_MANY
from benchmarks.paired_statistics import ratios
from benchmarks.pairs import interleave
from benchmarks.results_file import record, table
from benchmarks.stage_printer import stage_printer
from roentgen.store import CapturedRollout, CaptureSpec, Session, StoreWriter
from roentgen.store.storage_backends import LocalFolder, StorageFolder, open_folder
from roentgen.tokenized_text import Segment, TokenizedText
from tests.s3 import BUCKET, ENVIRONMENT, s3_endpoint

BLOCK = 8 << 20
KEYS = tuple(f"layers.{layer}.resid_post" for layer in range(12))
ROWS, WIDTH = 256, 1024
BUDGET = 0.8


@dataclass(frozen=True)
class Rates:
    """Megabytes per second of one thing that was done in turns, by way."""

    what: str
    raw: list[float]
    store: list[float]


def main(
    megabytes: Annotated[int, typer.Option(help="To write and read each time, on the disk; 0 to leave it out.")] = 1024,
    bucket_megabytes: Annotated[int, typer.Option(help="Likewise in the bucket.")] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="How many pairs.")] = 5,
    rollouts: Annotated[int, typer.Option(help="Of the large session; 0 to leave it out.")] = 1_000_000,
    bucket_rollouts: Annotated[int, typer.Option(help="Likewise in the bucket.")] = 100_000,
    folder: Annotated[Path | None, typer.Option(help="On the disk to measure; a temporary one if not given.")] = None,
    bucket: Annotated[str, typer.Option(help="s3://BUCKET/FOLDER; a server on this machine if not given.")] = "",
    write: Annotated[bool, typer.Option("--record/--no-record", help="Update RESULTS.md.")] = True,
) -> None:
    """Measure the activation store."""
    stage = stage_printer()
    bandwidths, sessions = [], []
    with tempfile.TemporaryDirectory(dir=folder) as made:
        here = Path(made)
        if megabytes:
            found = measure_bandwidth(open_folder(here / "bandwidth"), megabytes, rounds, stage)
            bandwidths.append(("disk", megabytes, found))
        for count in (rollouts, rollouts // 10):
            if count:
                sessions.append(("disk", measure_session(str(here / str(count)), count, stage)))
        with _bucket(bucket, here) as address:
            if bucket_megabytes:
                found = measure_bandwidth(open_folder(f"{address}/bandwidth"), bucket_megabytes, rounds, stage)
                bandwidths.append(("bucket", bucket_megabytes, found))
            if bucket_rollouts:
                sessions.append(("bucket", measure_session(f"{address}/many", bucket_rollouts, stage)))
    for title, body in (
        ("The activation store: bandwidth", report_bandwidth(bandwidths, rounds)),
        ("The activation store: many rollouts", report_sessions(sessions)),
    ):
        print(body)
        if body and write:
            record(title, body)


@contextmanager
def _bucket(address: str, folder: Path) -> Iterator[str]:
    """Yield a bucket's address: the one that is given, or that of a server on this machine."""
    if address:
        yield address
        return
    with s3_endpoint(folder / "moto.log") as endpoint:
        os.environ.update(ENVIRONMENT | {"AWS_ENDPOINT_URL": endpoint})
        yield f"s3://{BUCKET}"


def measure_bandwidth(folder: StorageFolder, megabytes: int, rounds: int, stage: Callable[[str], None]) -> list[Rates]:
    """Write and read the same bytes barely and through the store, in turns.

    Returns:
        Rates of writing, of reading everything, and of reading one layer of the twelve.
    """
    rollouts = _rollouts(megabytes)
    size = sum(rollout.nbytes for rollout in rollouts)
    buffer = np.empty((ROWS, WIDTH), dtype=np.int16)

    def timed(name: str, work: Callable[[], int]) -> float:
        gc.collect()  # what is still mapped cannot be dropped
        forget(folder)
        begin = time.perf_counter()
        done = work()
        rate = done / 1e6 / (time.perf_counter() - begin)
        stage(f"{folder.uri}: {name}: {rate:.0f} MB/s")
        return rate

    def write_store() -> int:
        _clear(folder.child("s"))
        with StoreWriter(folder, merge_shards=0) as writer:
            waiting = []
            for rollout in rollouts:
                writer.wait_for_room()
                waiting.append(writer.submit(rollout))
            for future in waiting:
                future.result()
        return size

    def read_store(keys: Sequence[str]) -> int:
        session = Session.open(folder.child("s"))
        done = 0
        for key in keys:
            for item in session.activations(key):
                # Not torch's copy, whose threads would be measured along.
                np.copyto(buffer, item.values.view(torch.int16).numpy())
                done += item.values.nbytes
        return done

    found = interleave(
        {
            "write, raw": lambda: timed("write, raw", lambda: _write_raw(folder, size)),
            "write, store": lambda: timed("write, store", write_store),
            "read, raw": lambda: timed("read, raw", lambda: _read_raw(folder)),
            "read, store": lambda: timed("read, store", lambda: read_store(KEYS)),
            "layer, store": lambda: timed("layer, store", lambda: read_store(KEYS[5:6])),
        },
        rounds,
    )
    return [
        Rates("write", found["write, raw"], found["write, store"]),
        Rates("read", found["read, raw"], found["read, store"]),
        Rates("read one layer of 12", found["read, raw"], found["layer, store"]),
    ]


def _rollouts(megabytes: int) -> list[CapturedRollout]:
    """Return rollouts of so many bytes; they share one rollout's tensors, so that making them costs nothing."""
    tensors = {key: torch.randn(ROWS, WIDTH).bfloat16() for key in KEYS}
    count = megabytes * 1_000_000 // sum(tensor.nbytes for tensor in tensors.values())
    spec = CaptureSpec(model="m", revision="r", keys=KEYS, positions="all", dtype="torch.bfloat16")
    position, tokens = np.arange(ROWS, dtype=np.int32), list(range(ROWS + 1))
    return [
        CapturedRollout(
            session_id="s",
            rollout_id=str(ULID()),
            spec=spec,
            tensors=tensors,
            position=position,
            sequence=TokenizedText("x" * ROWS, tokens, tokens, [Segment("user", 0, ROWS)], ROWS),
            logprobs=np.full(ROWS + 1, np.nan),
            finish_reason="stop",
        )
        for _ in range(count)
    ]


def _write_raw(folder: StorageFolder, size: int) -> int:
    """Write one file as fast as there is a way to, and flush it."""
    block = os.urandom(BLOCK)
    if isinstance(folder, LocalFolder):
        folder.path.mkdir(parents=True, exist_ok=True)
        with (folder.path / "raw").open("wb", buffering=0) as file:
            for _ in range(size // BLOCK):
                file.write(block)
            os.fsync(file.fileno())
    else:
        folder.put("raw", (block for _ in range(size // BLOCK)))
    return size // BLOCK * BLOCK


def _read_raw(folder: StorageFolder) -> int:
    """Read that file from its beginning to its end."""
    block, done = bytearray(BLOCK), 0
    if isinstance(folder, LocalFolder):
        with (folder.path / "raw").open("rb", buffering=0) as file:
            while count := file.readinto(block):
                done += count
        return done
    with folder.open_arrow("raw") as stream:
        while piece := stream.read(BLOCK):
            done += len(piece)
    return done


def forget(folder: StorageFolder) -> None:
    """Take a folder's files out of the page cache."""
    if isinstance(folder, LocalFolder):
        for path in folder.path.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _clear(session: StorageFolder) -> None:
    for folder in (session.child("index"), session.child("shards")):
        for entry in folder.entries():
            folder.remove(entry.name)


def report_bandwidth(measured: Sequence[tuple[str, int, Sequence[Rates]]], rounds: int) -> str:
    """Lay out what was measured of bandwidth; nothing if nothing was."""
    rows = [
        [
            f"{where}, {size:,} MB: {rates.what}", f"{median(rates.raw):.0f}", f"{median(rates.store):.0f}",
            str(ratios(rates.store, rates.raw)),
        ]
        for where, size, found in measured
        for rates in found
    ]  # fmt: skip
    if not rows:
        return ""
    text = (
        f"MB/s, {rounds} pairs in turn, groups of 64 MB and more; median ratio and interval. Bare means one file, written or "
        f"read from end to end (on the disk: flushed; read from a cold cache). Budget: {BUDGET}×."
    )
    return f"{text}\n\n{table(['what', 'bare', 'store', 'ratio'], rows)}"


def report_sessions(sessions: Sequence[tuple[str, Opened]]) -> str:
    """Lay out what was measured of large sessions; nothing if nothing was."""
    rows = [
        [
            where, f"{s.rollouts:,}", f"{s.index_files:,}, {s.index_bytes / 1e6:,.0f} MB", _spell(s.make),
            _spell(s.look_up), f"{_spell(s.table)}, {s.table.memory / s.rollouts:,.0f} B each", _spell(s.stack),
        ]
        for where, s in sessions
    ]  # fmt: skip
    if not rows:
        return ""
    text = (
        f"Rollouts of {TOKENS} tokens with a row of {4 * WIDTH_OF_MANY} bytes, each step in a process of its own: seconds, and "
        f"memory beyond the bare process. Look-up: the session is opened, and {ASKED:,} random rollouts are found by id and "
        "read. Table: it is opened, and where every rollout is is read, retried ones counted once. Stack: a row of each "
        "rollout, in one tensor, the table included in its memory."
    )
    header = ["where", "rollouts", "index files", "make", "look-up", "table", "stack"]
    return f"{text}\n\n{table(header, rows)}"


def _spell(step: StoreStep) -> str:
    return f"{step.seconds:.1f} s, {step.memory / 1e6:,.0f} MB"


if __name__ == "__main__":
    typer.run(main)
