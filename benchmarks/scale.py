"""Scaling of the evaluation's driver, `python -m benchmarks.scale --problems 1000000`, and its cost per problem, `python -m
benchmarks.scale --problems 10000 --parallel 1000 --latency 2`.

Everything is as in a run except the model: problems are distributed over Ray tasks, requests are real HTTP, and each sample
is scored, returned to the driver and fsynced into the record. The replicas are stand-ins that answer after a fixed time, so
that the driver is measured: its memory growth, its CPU use, and its samples per second. Memory is sampled during the run;
its slope over the second half predicts the growth at ten million problems.
"""

import asyncio
import json
import multiprocessing
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import typer

from benchmarks.results_file import record, table
from eval_jobs.endpoint import Endpoint
from eval_jobs.fanout import evaluate
from eval_jobs.problems import Problem
from eval_jobs.prompts import ANSWER_LINE
from eval_jobs.rollout import RolloutPlan
from eval_jobs.variants import Attempt, Variant
from roentgen.ray_connection import connected
from roentgen.runs import RunConfig, Sample, create_run, recording
from roentgen.serving.local_server import free_port

ANSWER = json.dumps(
    {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "stand-in",
        "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "So it is.\nAnswer: 4"}}
        ],
        "usage": {"prompt_tokens": 60, "completion_tokens": 8, "total_tokens": 68},
    }
).encode()
REPLY = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(ANSWER) + ANSWER


@dataclass(frozen=True)
class Growth:
    """What the driver took."""

    samples: int
    """Recorded so far."""
    seconds: float
    """Since the start."""
    megabytes: float
    """Of memory that the driver's process holds."""
    cpu_seconds: float
    """Of processor time that it has taken."""


def main(
    problems: Annotated[int, typer.Option(help="How many problems.")] = 1_000_000,
    replicas: Annotated[int, typer.Option(help="Stand-in servers, each with an address.")] = 2,
    parallel: Annotated[int, typer.Option(help="Requests in flight.")] = 64,
    latency: Annotated[float, typer.Option(help="Seconds that a stand-in takes to answer.")] = 0.0,
    write: Annotated[bool, typer.Option("--record/--no-record", help="Update RESULTS.md.")] = True,
) -> None:
    """Measure the driver over many problems."""
    with tempfile.TemporaryDirectory() as folder:
        found = measure(problems, replicas, parallel, latency, Path(folder))
    body = report(found, problems, replicas, parallel, latency)
    print(body)
    if write:
        record("Driver" if latency else "Scale", body)


def measure(count: int, replicas: int, parallel: int, latency: float, folder: Path) -> list[Growth]:
    """Run an evaluation against stand-ins; returns the driver's growth, a point per hundredth of the run."""
    ports = [free_port("127.0.0.1") for _ in range(replicas)]
    servers = [multiprocessing.get_context("spawn").Process(target=stand_in, args=(port, latency)) for port in ports]
    for server in servers:
        server.start()
    urls = ",".join(f"http://127.0.0.1:{port}/v1" for port in ports)
    plan = RolloutPlan(Endpoint(urls), "stand-in", ANSWER_LINE, {"max_tokens": 8, "seed": 0}, ANSWER_LINE.extractor)
    variant = Variant(None, "", "0" * 16)
    attempts = [
        Attempt(Problem(f"p{n}", n, f"What is {n} + {n}?", f"#### {2 * n}", str(2 * n)), variant)
        for n in range(1, count + 1)
    ]
    config = RunConfig(
        run_id="scale", created="", config_hash=variant.config_hash, hashed={}, problems={}, settings={}, prompt={},
        versions={}, git_revision=None,
    )  # fmt: skip
    run = create_run(folder / "run", config)
    memory, found, step = psutil.Process(), [], max(1, count // 100)
    try:
        with recording(run) as recorder, connected("local"):
            start, busy = time.monotonic(), time.process_time()
            seen = 0

            def keep(sample: Sample) -> None:
                nonlocal seen
                if sample.error is not None:
                    raise RuntimeError(f"the stand-ins failed: {sample.error}")
                recorder.append(sample)
                seen += 1
                if seen % step == 0:
                    taken = time.monotonic() - start, memory.memory_info().rss / 1e6, time.process_time() - busy
                    found.append(Growth(seen, *taken))
                    if seen % (10 * step) == 0:
                        print(f"{found[-1]}", file=sys.stderr, flush=True)

            evaluate(attempts, plan, parallel, keep)
        recorded = sum(1 for _ in run.record_path.open("rb"))
        if not (recorded == seen == count):
            raise RuntimeError(f"{count} problems, {seen} samples, {recorded} recorded")
    finally:
        for server in servers:
            server.terminate()
            server.join()
    return found


def stand_in(port: int, latency: float) -> None:
    """Answer every request with the same completion, after `latency` seconds; never returns."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                lengths = [
                    line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
                ]
                await reader.readexactly(int(lengths[0]) if lengths else 0)
                await asyncio.sleep(latency)
                writer.write(REPLY)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def run() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", port, backlog=1_000) as server:
            await server.serve_forever()

    asyncio.run(run())


def report(found: list[Growth], problems: int, replicas: int, parallel: int, latency: float) -> str:
    """Lay out what was measured."""
    later = found[len(found) // 2 :]
    slope = float(np.polyfit([point.samples for point in later], [point.megabytes for point in later], 1)[0]) * 1e6
    rate = found[-1].samples / found[-1].seconds
    shown = [found[0], *(found[len(found) * part // 4 - 1] for part in (1, 2, 3, 4))]
    rows = [[f"{p.samples:,}", f"{p.seconds:.0f}", f"{p.samples / p.seconds:.0f}", f"{p.megabytes:.0f}"] for p in shown]
    answer = f"after {latency:g} s" if latency else "at once"
    per_problem = 1000 * found[-1].cpu_seconds / found[-1].samples
    ideal = problems * latency / parallel
    return "\n".join(
        [
            f"{problems:,} problems, {parallel} requests in flight, {replicas} stand-in servers that answer {answer}, the",
            "record fsynced sample by sample; tasks, servers and driver share the cores.",
            "",
            table(["samples", "seconds", "samples/s", "driver, MB"], rows),
            "",
            f"{rate:.0f} samples/s; the driver takes {per_problem:.2f} ms of processor time per problem, and over the",
            f"second half its memory changes by {slope:+.0f} MB per million samples. The servers' time alone is {ideal:.0f} s;",
            f"beyond it, the whole takes {1000 * (found[-1].seconds - ideal) / problems:.2f} ms per problem.",
        ]
    )


if __name__ == "__main__":
    typer.run(main)
