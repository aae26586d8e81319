"""The server compared with direct calls of the engine: `python -m benchmarks.serving`.

Two copies of the model, one in a Ray Serve replica behind HTTP and one in this process, alternate on the same prompts. The
server renders the messages and stores captured rows before it replies; the direct calls do neither. The ratio is therefore
the total cost of these.
"""

import asyncio
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from openai import AsyncOpenAI

from benchmarks.paired_statistics import Interval, ratios
from benchmarks.pairs import interleave
from benchmarks.results_file import record, table
from benchmarks.stage_printer import stage_printer
from benchmarks.ways import engine_way
from benchmarks.workload import CAPTURES, Workload, capture_request
from roentgen.defaults import EMBEDDED_MODEL
from roentgen.ray_connection import LOCAL
from roentgen.serving.local_server import serving
from serve_app.config import ServerConfig
from serve_app.engines.transformers.engine import TransformersEngine

BUDGET = 0.9
WORKER_NICENESS = int(os.environ.get("RAY_worker_niceness", "15"))  # noqa: SIM112 - as Ray spells it
"""What Ray adds to the niceness of its workers."""


def main(
    model: Annotated[str, typer.Option(help=f"{EMBEDDED_MODEL}, a folder, or a hub id.")] = EMBEDDED_MODEL,
    random_weights: Annotated[str, typer.Option(help="Instead, a shape with random weights: qwen3-0.6b.")] = "",
    problems: Annotated[str, typer.Option(help="A source of problems; GSM8K if it is at hand.")] = "",
    in_flight: Annotated[int, typer.Option(help="Requests at once.")] = 16,
    prompts: Annotated[int, typer.Option(help="Per run.")] = 16,
    max_tokens: Annotated[int, typer.Option(help="The most to generate per prompt.")] = 48,
    pairs: Annotated[int, typer.Option(help="Rounds of interleaved runs.")] = 5,
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    write: Annotated[bool, typer.Option("--record/--no-record", help="Update RESULTS.md.")] = True,
) -> None:
    """Measure the server against its own engine."""
    workload = Workload(model, random_weights, problems, max_tokens, dtype, device)
    stage = stage_printer()
    with tempfile.TemporaryDirectory() as folder:
        found = measure_serving(workload.saved(Path(folder)), Path(folder), prompts, in_flight, pairs, stage)
    body = report(workload, found, in_flight, pairs)
    print(body)
    if write:
        record("Serving", body)


def measure_serving(
    workload: Workload, folder: Path, prompts: int, in_flight: int, rounds: int, stage: Callable[[str], None]
) -> dict[str, Interval]:
    """Return, per capture, the ratio of tokens per second through HTTP to tokens per second of the engine itself.

    Args:
        workload: what to run; its model is one that the server can load.
        folder: for the server's store.
        prompts: per run.
        in_flight: requests at once.
        rounds: how many pairs.
        stage: told what is being done.
    """
    _, dtype = workload.place()
    config = ServerConfig.model_validate(
        {
            "model": workload.model,
            "dtype": str(dtype).removeprefix("torch."),
            "device": workload.device,
            "store": str(folder / "store"),
            "max_batch": in_flight,
            "num_gpus": 1 if workload.place()[0].type == "cuda" else 0,
        }
    )
    with serving(config, ray_address=LOCAL, stage=stage) as base_url:
        # Ray runs its workers at low priority; the engine beside them must not have a better one where others compute too.
        os.nice(max(0, WORKER_NICENESS - os.nice(0)))
        loaded = workload.load()
        tokens, messages = workload.prompts(loaded.tokenizer, prompts), workload.messages(prompts)
        engine = TransformersEngine(loaded, max_batch=in_flight, max_queue=1024, prefix_cache=False)

        def direct(capture: str) -> float:
            run = engine_way(engine, loaded, capture)(tokens, max_tokens, in_flight)
            stage(f"engine, {capture}: {run.rate:.1f} tokens/s")
            return run.rate

        def served(capture: str) -> float:
            asked = capture_request(loaded.structure.num_layers, capture)
            body = {"activations": asked.model_dump(mode="json", exclude_none=True, by_alias=True)} if asked else {}
            rate = asyncio.run(ask_all(base_url, loaded.source.name, messages, body, max_tokens, in_flight))
            stage(f"HTTP, {capture}: {rate:.1f} tokens/s")
            return rate

        max_tokens = workload.max_tokens
        arms: dict[str, Callable[[], float]] = {}
        for capture in CAPTURES:
            arms[f"engine {capture}"] = lambda capture=capture: direct(capture)  # type: ignore[misc]
            arms[f"http {capture}"] = lambda capture=capture: served(capture)  # type: ignore[misc]
        try:
            interleave(arms, 1)  # warms both up, with every capture
            rates = interleave(arms, rounds)
        finally:
            engine.close()
    return {capture: ratios(rates[f"http {capture}"], rates[f"engine {capture}"]) for capture in CAPTURES}


async def ask_all(
    base_url: str, model: str, messages: list[Any], body: dict[str, Any], max_tokens: int, in_flight: int
) -> float:
    """Send all requests, so many at once; returns the tokens generated per second."""
    gate = asyncio.Semaphore(in_flight)

    async def ask(client: AsyncOpenAI, conversation: Any) -> int:
        async with gate:
            reply = await client.chat.completions.create(
                model=model, messages=conversation, temperature=0, max_tokens=max_tokens, extra_body=body
            )
        assert reply.usage is not None
        return reply.usage.completion_tokens

    async with AsyncOpenAI(base_url=base_url, api_key="none", timeout=3600) as client:
        start = time.perf_counter()
        tokens = await asyncio.gather(*(ask(client, conversation) for conversation in messages))
        return sum(tokens) / (time.perf_counter() - start)


def report(workload: Workload, found: dict[str, Interval], in_flight: int, rounds: int) -> str:
    """Lay out the results in Markdown."""
    names = {"none": "nothing", "3x2": "3 layers × 2 hook points", "all": "every layer's residual"}
    rows = [[names[capture], f"{BUDGET}×", str(interval), str(rounds)] for capture, interval in found.items()]
    coverage = f"{next(iter(found.values())).coverage:.0%}"
    return "\n\n".join(
        [
            f"{workload.name}, {in_flight} in flight, at most {workload.max_tokens} tokens per GSM8K-shaped prompt: through "
            "HTTP and Ray Serve, captures stored before the reply, against the engine called directly, which stores "
            f"nothing; interleaved runs, median ratio and its {coverage} interval.",
            table(["captured", "budget", "median (interval)", "pairs"], rows),
        ]
    )


if __name__ == "__main__":
    typer.run(main)
