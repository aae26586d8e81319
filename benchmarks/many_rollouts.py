"""A session with very many rollouts: written with the store's writer, then opened and read by new processes.

Each step runs in its own process. The reported memory is the excess of its peak over importing the store and reading a
session of ten rollouts.
"""

import multiprocessing
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from roentgen.contract import RolloutKey
from roentgen.store import CapturedRollout, CaptureSpec, Session, StoreWriter
from roentgen.tokenized_text import Segment, TokenizedText

KEY = "layers.0.resid_post"
WIDTH, TOKENS = 16, 80
ASKED = 1000
"""Rollouts that are looked up at random."""


@dataclass(frozen=True)
class StoreStep:
    """What one step took, in seconds, and how many bytes of memory beyond the bare process."""

    seconds: float
    memory: int


@dataclass(frozen=True)
class Opened:
    """Time and memory that a session of many rollouts took."""

    rollouts: int
    """How many rollouts."""
    index_files: int
    """Index files that name them."""
    index_bytes: int
    """Size of those files."""
    make: StoreStep
    """To write them, the writer merging as it goes."""
    look_up: StoreStep
    """To open the session, and to find and read `ASKED` rollouts by id."""
    table: StoreStep
    """To open the session, and to read where every rollout is, retried ones counted once."""
    stack: StoreStep
    """Beyond that, to read a row of each of them."""


def measure_session(store: str, rollouts: int, stage: Callable[[str], None]) -> Opened:
    """Make a session in a store and measure it."""
    steps: dict[str, StoreStep] = {}
    _alone(_make, f"{store}-warm", 10)
    for name, work in (("make", _make), ("look_up", _look_up), ("table", _table), ("stack", _stack)):
        steps[name] = _alone(work, store, rollouts)
        stage(f"{store}: {rollouts:,} rollouts: {name}: {steps[name]}")
    files = Session.open(f"{store}/s").folder.child("index").entries()
    live = Session.open(f"{store}/s").index(("rollout_id",))
    return Opened(rollouts, len(live), sum(file.size for file in files if file.name in live), **steps)


def _alone(work: Callable[[str, int], float], store: str, rollouts: int) -> StoreStep:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as pool:
        return pool.submit(_measured, work, store, rollouts).result()


def _measured(work: Callable[[str, int], float], store: str, rollouts: int) -> StoreStep:
    if work is not _make:
        _look_up(f"{store}-warm", 10)
    before = _peak()
    return StoreStep(work(store, rollouts), max(0, _peak() - before))


def _peak() -> int:
    # Not `ru_maxrss`, which a process takes over from the one that started it.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _make(store: str, rollouts: int) -> float:
    """Write rollouts whose one row says their number; every hundredth is a retry of the one before."""
    spec = CaptureSpec(model="m", revision="r", keys=(KEY,), positions="last_prompt", dtype="torch.float32")
    tokens, text = list(range(1000, 1000 + TOKENS)), "a word or two " * 20
    begin = time.perf_counter()
    with StoreWriter(store) as writer:
        for number in range(rollouts):
            writer.wait_for_room()
            problem = number - (number % 100 == 99)
            last = writer.submit(
                CapturedRollout(
                    session_id="s",
                    rollout_id=_id(number),
                    spec=spec,
                    tensors={KEY: torch.full((1, WIDTH), float(number))},
                    position=np.array([TOKENS // 2 - 1], dtype=np.int32),
                    sequence=TokenizedText(text, tokens, tokens, [Segment("user", 0, 10)], TOKENS // 2),
                    logprobs=np.full(TOKENS, np.nan),
                    finish_reason="stop",
                    key=RolloutKey(config_hash="c" * 16, problem_id=f"problem-{problem}"),
                    labels={"number": number},
                )
            )
        last.result()
    return time.perf_counter() - begin


def _id(number: int) -> str:
    return f"01{number:024}"


def _look_up(store: str, rollouts: int) -> float:
    chosen = random.Random(0).sample(range(rollouts), min(ASKED, rollouts))
    numbers = {_id(number): number for number in chosen}
    begin = time.perf_counter()
    session = Session.open(f"{store}/s")
    frame = session.rollouts(ids=numbers, columns=())
    read = {item.rollout_id: item.values for item in session.activations(KEY, where=frame)}
    taken = time.perf_counter() - begin
    if len(read) != len(numbers) or any((read[one] != number).any() for one, number in numbers.items()):
        raise RuntimeError(f"{store}: what was looked up is not what was written")
    return taken


def _table(store: str, rollouts: int) -> float:
    begin = time.perf_counter()
    frame = Session.open(f"{store}/s").rollouts(columns=())
    taken = time.perf_counter() - begin
    if len(frame) != rollouts - rollouts // 100:
        raise RuntimeError(f"{store}: {len(frame)} rollouts count, of {rollouts}")
    return taken


def _stack(store: str, rollouts: int) -> float:
    session = Session.open(f"{store}/s")
    frame = session.rollouts(columns=())
    begin = time.perf_counter()
    values = session.activations(KEY, where=frame, positions="last_prompt").stack()
    taken = time.perf_counter() - begin
    numbers = torch.tensor([int(problem.split("-")[1]) for problem in frame["problem_id"]])
    if not ((values[:, 0] - numbers).abs() <= 1).all():
        raise RuntimeError(f"{store}: the rows are not those of the rollouts")
    return taken
