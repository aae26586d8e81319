"""`roentgen view` on a session of a million rollouts: `python -m benchmarks.view`.

The session is made with the store's writer: rollouts of 80 rows, with texts, labels and a retry here and there. A fresh process
then serves the page and is asked as a browser asks: how long until the first window of samples is there, with nothing kept from
before and with the table that an earlier start has left; how long filters, sorting, searching and scrolling take; how long a
sample's tokens with a probe's colors; and how much memory that needed in all. The same in a bucket, a server on this machine.
"""

import json
import multiprocessing
import os
import random
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import numpy as np
import torch
import typer
from httpx2 import Client

from benchmarks.results_file import record, table
from benchmarks.stage_printer import stage_printer
from roentgen.contract import RolloutKey
from roentgen.store import CapturedRollout, CaptureSpec, StoreWriter
from roentgen.tokenized_text import Segment, TokenizedText
from tests.s3 import BUCKET, ENVIRONMENT, s3_endpoint

KEYS = ("layers.4.resid_post", "layers.8.resid_post")
WIDTH, N_PROMPT, N_COMPLETION = 16, 50, 31
ROWS = N_PROMPT + N_COMPLETION - 1
WORDS = (
    "the", "cost", "of", "each", "apple", "is", "two", "dollars", "so", "she", "pays", "for", "all", "eggs", "and", "then",
    "has", "left", "how", "many", "in", "total", "answer",
)  # fmt: skip


def make(store: str, first: int, last: int) -> None:
    """Write rollouts `[first, last)` of the session "s"; each hundredth is a retry of the one before."""
    spec = CaptureSpec(model="m", revision="r", keys=KEYS, positions="all", dtype="torch.bfloat16")
    generator, chosen = np.random.default_rng(first), random.Random(first)
    tensors = [{key: torch.randn(ROWS, WIDTH).bfloat16() for key in KEYS} for _ in range(64)]
    tokens = N_PROMPT + N_COMPLETION
    position = np.arange(ROWS, dtype=np.int32)
    logprobs = np.where(np.arange(tokens) < N_PROMPT, np.nan, -0.5)
    with StoreWriter(store) as writer:
        for number in range(first, last):
            writer.wait_for_room()
            words = [*chosen.choices(WORDS, k=tokens - 1), str(number)]
            offsets = np.concatenate([[0], np.cumsum([len(word) + 1 for word in words[:-1]])]).tolist()
            text = " ".join(words)
            problem = number - (number % 100 == 99)
            done = writer.submit(
                CapturedRollout(
                    session_id="s",
                    rollout_id=f"01{number:024}",
                    spec=spec,
                    tensors=tensors[number % len(tensors)],
                    position=position,
                    sequence=TokenizedText(
                        text, generator.integers(0, 50_000, tokens).tolist(), offsets,
                        [Segment("user", 0, offsets[N_PROMPT]), Segment("assistant", offsets[N_PROMPT], len(text))], N_PROMPT,
                    ),
                    logprobs=logprobs,
                    finish_reason="length" if number % 7 == 0 else "stop",
                    key=RolloutKey(config_hash="c" * 16, problem_id=f"problem-{problem}"),
                    labels={"difficulty": number % 1000 / 10, "topic": f"topic {number % 12}", "correct": number % 3 == 0},
                )
            )  # fmt: skip
        done.result()


LISTS = {
    "filter by a label": {"where": '[["labels.difficulty", ">", 50]]'},
    "filter by three columns": {
        "where": '[["finish_reason", "=", "length"], ["labels.topic", "in", ["topic 1", "topic 2"]], ["epoch", "<", 2]]'
    },
    "scroll to the middle": {"offset": "495000"},
    "sort by a label": {"sort": "-labels.difficulty"},
    "search the texts": {"q": "answer 12345"},
}
"""Questions for windows of samples."""


def ask(store: str, cache: str) -> dict[str, float]:
    """Serve the page over a store and ask as a browser does; return seconds by question, and `memory` in bytes."""
    os.environ["ROENTGEN_CACHE"] = cache
    from roentgen.view.serving import viewing

    found: dict[str, float] = {}
    with viewing([store]) as address, Client(timeout=600) as client:
        base, _, token = address.partition("?token=")

        def get(name: str, path: str, **query: str) -> dict[str, object]:
            begin = time.perf_counter()
            reply = client.get(f"{base}api/{path}", params=query, headers={"Authorization": f"Bearer {token}"})
            found[name] = found.get(name, 0.0) + time.perf_counter() - begin
            if reply.status_code != 200:
                raise RuntimeError(f"{path}: {reply.text}")
            answer: dict[str, object] = json.loads(reply.content)
            return answer

        sources = get("open", "sources")["sources"]
        assert isinstance(sources, list)
        (session,) = (source["id"] for source in sources if source["kind"] == "session")
        get("open", f"sources/{session}/samples", limit="100")
        get("columns", f"sources/{session}")
        for name, query in LISTS.items():
            get(name, f"sources/{session}/samples", limit="100", **query)
        get("histogram", f"sources/{session}/histogram", column="labels.difficulty", by="finish_reason")
        for number in (777, 4_321, 12_345):
            sample = f"sources/{session}/samples/{quote(f'01{number:024}')}"
            before = found.get("tokens with colors", 0.0)
            get("tokens with colors", f"{sample}/tokens")
            get("tokens with colors", f"{sample}/values", of=f"norm:{KEYS[0]}")
            found["tokens with colors"] = max(before, found["tokens with colors"] - before)
    (line,) = (one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM:"))
    return found | {"memory": int(line.split()[1]) * 1024.0}


def _alone(store: str, cache: str) -> dict[str, float]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(ask, store, cache).result()


def main(
    rollouts: Annotated[int, typer.Option(help="Of the session on the disk.")] = 1_000_000,
    bucket_rollouts: Annotated[int, typer.Option(help="Of the session in a bucket; 0 to leave it out.")] = 100_000,
    folder: Annotated[Path | None, typer.Option(help="Where the store is, or is made and left.")] = None,
    write: Annotated[bool, typer.Option("--record/--no-record", help="Update RESULTS.md.")] = True,
) -> None:
    """Measure `roentgen view`."""
    stage = stage_printer()
    with tempfile.TemporaryDirectory() as made:
        here = Path(made)
        store = str((folder or here) / "store")
        if not Path(store).exists():
            make(store, 0, rollouts)
        columns = {"disk, first time": _alone(store, str(here / "cache"))}
        stage(f"disk, first time: {columns}")
        columns["disk, again"] = _alone(store, str(here / "cache"))
        stage("disk, again")
        if bucket_rollouts:
            with s3_endpoint(here / "moto.log") as endpoint:
                os.environ.update(ENVIRONMENT | {"AWS_ENDPOINT_URL": endpoint})
                make(f"s3://{BUCKET}/view", 0, bucket_rollouts)
                columns[f"bucket, {bucket_rollouts:,}, first time"] = _alone(f"s3://{BUCKET}/view", str(here / "cache"))
    body = report(rollouts, columns)
    print(body)
    if write:
        record("The page", body)


def report(rollouts: int, columns: dict[str, dict[str, float]]) -> str:
    """Return the section of RESULTS.md."""
    names = [name for name in next(iter(columns.values())) if name != "memory"]
    rows = [[name, *(f"{one[name]:.2f} s" for one in columns.values())] for name in names]
    rows.append(["memory at most", *(f"{one['memory'] / 1e6:,.0f} MB" for one in columns.values())])
    return (
        f"`roentgen view` over a session of {rollouts:,} rollouts of {ROWS} rows, in a process of its own, the page cache "
        "warm. Open: the list of sources and the first hundred samples. First time: nothing is kept from before; again: "
        "with the table that the first start left. Tokens with colors: a sample's tokens and a number for each, the slowest "
        "of three. Memory is the server's high-water mark with all its libraries, and the asking client's.\n\n"
        + table(["question", *columns], rows)
        + "\nAim: opens in < 2 s and lists in < 1 s, in < 1 GB; a sample's tokens in < 0.3 s; a bucket opens in < 10 s. "
        "The very first opening, which reads the whole index, takes longer than that; those after it do not."
    )


if __name__ == "__main__":
    typer.run(main)
