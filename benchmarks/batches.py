"""Shuffled batches compared with sequential reads: `python -m benchmarks.batches`.

A session is written with the store's writer. The rows of one key are read alternately, from files dropped from the page
cache: in order, as from `session.activations(key)`, and as batches with and without shuffling. Each run reads a whole
layer, every byte once.
"""

import gc
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import torch
import typer
from ulid import ULID

from benchmarks.paired_statistics import ratios
from benchmarks.pairs import interleave
from benchmarks.results_file import record, table
from benchmarks.stage_printer import stage_printer
from benchmarks.store import forget
from roentgen.store import CapturedRollout, CaptureSpec, Session, StoreWriter
from roentgen.store.activations import Activations
from roentgen.store.storage_backends import open_folder
from roentgen.tokenized_text import Segment, TokenizedText

KEYS = ("layers.4.resid_post", "layers.8.resid_post")
KEY = KEYS[1]
WIDTH = 1024
SHORTEST, LONGEST = 50, 600
MAKE_MB = 64
"""Of activations that are written by one call of the random generator."""


@dataclass(frozen=True)
class BatchTimes:
    """Megabytes per second, by way, and how far apart the rows of a batch are from."""

    rates: dict[str, list[float]]
    """By way, in turns."""
    rollouts: int
    """In the session."""
    mixed: float
    """Different rollouts in a shuffled batch, in the median."""
    peak: float
    """Bytes by which the process grew while it read shuffled batches for the first time."""


def main(
    megabytes: Annotated[int, typer.Option(help="Of the layer that is read.")] = 2048,
    tokens: Annotated[int, typer.Option(help="Rows in a batch.")] = 4096,
    rounds: Annotated[int, typer.Option(min=1, help="How many pairs.")] = 5,
    folder: Annotated[Path | None, typer.Option(help="On the disk to measure; a temporary one if not given.")] = None,
    write: Annotated[bool, typer.Option("--record/--no-record", help="Update RESULTS.md.")] = True,
) -> None:
    """Measure batches of rows."""
    with tempfile.TemporaryDirectory(dir=folder) as made:
        body = report(measure(Path(made), megabytes, tokens, rounds, stage_printer()), megabytes, tokens)
    print(body)
    if write:
        record("Shuffled batches of rows", body)


def measure(folder: Path, megabytes: int, tokens: int, rounds: int, stage: Callable[[str], None]) -> BatchTimes:
    """Read one layer in turns, in order and as batches."""
    stage(f"writing {2 * megabytes:,} MB")
    rollouts = write_session(folder, megabytes)
    storage = open_folder(folder)
    sink = np.empty((max(tokens, LONGEST), WIDTH), dtype=np.int16)
    mixed: list[int] = []

    def rows() -> Activations:
        return Session.open(folder / "s").activations(KEY)  # anew: what is still mapped cannot be dropped

    def in_order() -> int:
        done = 0
        for item in rows():
            np.copyto(sink[: len(item.values)], item.values.view(torch.int16).numpy())
            done += item.values.nbytes
        return done

    def batches(shuffle: bool) -> int:
        done = 0
        for batch in rows().batches(tokens, shuffle=shuffle, seed=len(mixed)):
            np.copyto(sink[: len(batch.values)], batch.values.view(torch.int16).numpy())
            done += batch.values.nbytes
            if shuffle:
                mixed.append(len(np.unique(batch.rollout)))
        return done

    def timed(name: str, work: Callable[[], int]) -> float:
        gc.collect()
        forget(storage)
        begin = time.perf_counter()
        done = work()
        rate = done / 1e6 / (time.perf_counter() - begin)
        stage(f"{name}: {rate:.0f} MB/s")
        return rate

    timed("in order, not counted", in_order)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    timed("shuffled, not counted", lambda: batches(True))
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    ways = {
        "in order": lambda: timed("in order", in_order),
        "shuffled": lambda: timed("shuffled", lambda: batches(True)),
        "batches in order": lambda: timed("batches in order", lambda: batches(False)),
    }
    return BatchTimes(interleave(ways, rounds), rollouts, median(mixed), peak)


def write_session(folder: Path, megabytes: int) -> int:
    """Write a session with so much of each key; returns how many rollouts it has."""
    generator = np.random.default_rng(0)
    spec = CaptureSpec(model="m", revision="r", keys=KEYS, positions="all", dtype="torch.bfloat16")
    count = rows = 0
    noise = torch.randn(MAKE_MB * 1_000_000 // (2 * WIDTH), WIDTH).bfloat16()
    with StoreWriter(folder, merge_shards=0) as writer:
        while rows * WIDTH * 2 < megabytes * 1_000_000:
            length = int(generator.integers(SHORTEST, LONGEST + 1))
            start = int(generator.integers(0, max(1, len(noise) - length)))
            values = noise[start : start + length]
            tokens = list(range(length))
            writer.wait_for_room()
            writer.submit(
                CapturedRollout(
                    session_id="s",
                    rollout_id=str(ULID()),
                    spec=spec,
                    tensors=dict.fromkeys(KEYS, values),
                    position=np.arange(len(values), dtype=np.int32),
                    sequence=TokenizedText("x" * length, tokens, tokens, [Segment("user", 0, length)], length),
                    logprobs=np.full(length, np.nan),
                    finish_reason="stop",
                )
            )
            count, rows = count + 1, rows + len(values)
    return count


def report(found: BatchTimes, megabytes: int, tokens: int) -> str:
    """Format the results as Markdown."""
    base = found.rates["in order"]
    rows = [
        [name, f"{median(rates):.0f}", "1" if name == "in order" else str(ratios(rates, base))]
        for name, rates in found.rates.items()
    ]
    text = (
        f"One layer of {megabytes:,} MB, {found.rollouts:,} rollouts of {SHORTEST} to {LONGEST} rows of {2 * WIDTH:,} bytes, "
        f"read from a cold cache, {len(base)} pairs in turn; batches of {tokens:,} rows. A shuffled batch has rows of "
        f"{found.mixed:,.0f} rollouts in the median. Shuffling took {found.peak / 1e6:,.0f} MB more memory than reading in "
        "order had, mapped pages included."
    )
    return f"{text}\n\n{table(['way', 'MB/s', 'ratio'], rows)}"


if __name__ == "__main__":
    typer.run(main)
