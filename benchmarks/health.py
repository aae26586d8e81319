"""Latency of `/health` under full load: `python -m benchmarks.health`.

A server whose batch and queue are full of captured generations is polled at a fixed rate (a late answer does not delay the
next request), as a load balancer would; once idle and once under load.
"""

import asyncio
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from httpx2 import AsyncClient
from openai import AsyncOpenAI, RateLimitError

from benchmarks.paired_statistics import percentile
from benchmarks.results_file import record, table
from benchmarks.stage_printer import stage_printer
from benchmarks.workload import Workload
from roentgen.defaults import EMBEDDED_MODEL
from roentgen.ray_connection import LOCAL
from roentgen.serving.local_server import serving
from serve_app.config import ServerConfig

BUDGET_S = 0.2
CAPTURE = {"activations": {"layers": "all", "hook_points": ["resid_post"]}}


@dataclass(frozen=True)
class Answers:
    """How `/health` answered in one state of the server."""

    state: str
    """Of the server."""
    seconds: list[float]
    """How long each answer took."""
    statuses: list[int]
    """The answers' HTTP statuses."""


def main(
    model: Annotated[str, typer.Option(help=f"{EMBEDDED_MODEL}, a folder, or a hub id.")] = EMBEDDED_MODEL,
    problems: Annotated[str, typer.Option(help="A source of problems; GSM8K if it is at hand.")] = "",
    max_batch: Annotated[int, typer.Option(help="Generations at once.")] = 16,
    clients: Annotated[int, typer.Option(help="Requests at once; more than fit into the batch.")] = 64,
    max_tokens: Annotated[int, typer.Option(help="The most to generate per prompt.")] = 64,
    every: Annotated[float, typer.Option(help="Seconds between two questions.")] = 0.1,
    lasting: Annotated[float, typer.Option(help="Seconds to ask, idle and under load each.")] = 90,
    write: Annotated[bool, typer.Option("--record/--no-record", help="Update RESULTS.md.")] = True,
) -> None:
    """Measure how soon `/health` answers."""
    workload = Workload(model, problems=problems, max_tokens=max_tokens)
    stage = stage_printer()
    with tempfile.TemporaryDirectory() as folder:
        found = measure_health(workload, Path(folder), max_batch, clients, every, lasting, stage)
    body = report(workload, found, max_batch, clients)
    print(body)
    if write:
        record("Health", body)


def measure_health(
    workload: Workload,
    folder: Path,
    max_batch: int,
    clients: int,
    every: float,
    lasting: float,
    stage: Callable[[str], None],
) -> list[Answers]:
    """Ask a server how it is, idle and then under load.

    Args:
        workload: what the load generates.
        folder: for the server's store.
        max_batch: generations at once.
        clients: requests at once.
        every: seconds between two questions.
        lasting: seconds to ask, in each state.
        stage: told what is being done.
    """
    config = ServerConfig(model=workload.model, store=str(folder / "store"), max_batch=max_batch)
    with serving(config, ray_address=LOCAL, stage=stage) as base_url:
        idle = asyncio.run(_ask(base_url, "idle", every, lasting))
        stage(f"idle: {percentile(idle.seconds, 99) * 1e3:.0f} ms at the 99th percentile")
        loaded = asyncio.run(_ask_under_load(workload, base_url, clients, every, lasting))
        stage(f"under load: {percentile(loaded.seconds, 99) * 1e3:.0f} ms at the 99th percentile")
    return [idle, loaded]


async def _ask(base_url: str, state: str, every: float, lasting: float) -> Answers:
    """Ask at a steady pace."""
    answers = Answers(state, [], [])
    url = base_url.removesuffix("/v1") + "/health"

    async def once(client: AsyncClient) -> None:
        start = time.perf_counter()
        reply = await client.get(url)
        answers.seconds.append(time.perf_counter() - start)
        answers.statuses.append(reply.status_code)

    async with AsyncClient(timeout=60) as client, asyncio.TaskGroup() as group:
        end = time.monotonic() + lasting
        while time.monotonic() < end:
            group.create_task(once(client))
            await asyncio.sleep(every)
    return answers


async def _ask_under_load(workload: Workload, base_url: str, clients: int, every: float, lasting: float) -> Answers:
    """Ask while as many clients as given each send one captured request after the other."""
    messages = workload.messages(clients)

    async def keep_busy(client: AsyncOpenAI, conversation: list[dict[str, str]]) -> None:
        while True:
            try:
                await client.chat.completions.create(
                    model=workload.model,
                    messages=conversation,  # type: ignore[arg-type]
                    max_tokens=workload.max_tokens,
                    extra_body=CAPTURE,
                )
            except RateLimitError:
                await asyncio.sleep(0.1)

    async with AsyncOpenAI(base_url=base_url, api_key="none", timeout=3600, max_retries=0) as client:
        load = [asyncio.create_task(keep_busy(client, conversation)) for conversation in messages]
        await asyncio.sleep(5)  # until the batch is full
        answers = await _ask(base_url, "under load", every, lasting)
        early = [task for task in load if task.done()]
        for task in load:
            task.cancel()
        await asyncio.gather(*load, return_exceptions=True)
    for task in early:
        task.result()  # a client whose requests fail puts no load on
    return answers


def report(workload: Workload, found: list[Answers], max_batch: int, clients: int) -> str:
    """Lay out the results in Markdown."""
    rows = [
        [
            answers.state,
            str(len(answers.seconds)),
            *(f"{value * 1e3:.0f} ms" for value in (median(answers.seconds), percentile(answers.seconds, 99))),
            f"{max(answers.seconds) * 1e3:.0f} ms",
            str(sum(status != 200 for status in answers.statuses)),
        ]
        for answers in found
    ]
    return "\n\n".join(
        [
            f"{workload.name}: {clients} clients that always wait for an answer, {max_batch} generations at once, every "
            f"layer's residual captured. Budget: {BUDGET_S * 1e3:.0f} ms at the 99th percentile.",
            table(["server", "asked", "median", "99th percentile", "longest", "not 200"], rows),
        ]
    )


if __name__ == "__main__":
    typer.run(main)
