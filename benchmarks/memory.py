"""Memory of a replica over many captured requests: `python -m benchmarks.memory`.

Requests run through the engine, their rows are committed to a store in a temporary folder, and the process's resident
memory is sampled periodically. The expected result is a flat line: nothing of a finished request is retained.
"""

import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import psutil
import typer
from ulid import ULID

from benchmarks.paired_statistics import Interval, slope_interval
from benchmarks.results_file import record, table
from benchmarks.stage_printer import stage_printer
from benchmarks.workload import CAPTURES, Workload, capture_plan
from roentgen.defaults import EMBEDDED_MODEL
from roentgen.store import CapturedRollout, CaptureSpec, Receipt, StoreWriter
from roentgen.tokenized_text import Segment, TokenizedText
from serve_app.engines.protocol import Event, Failed, Finished, GenerationJob, Sampling
from serve_app.engines.transformers.engine import TransformersEngine
from serve_app.engines.transformers.loaded_model import LoadedModel

PROMPT_TOKENS = 48
"""Prompts are cut to this: it is the number of requests that matters here."""

SETTLING = 0.2
"""Share of the run before the slope is taken: allocators and caches fill first."""

FLAT = 0.02
"""Growth over the whole run, as a share of the memory, that still counts as flat."""

BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class MemorySample:
    """The memory after some requests, in bytes."""

    requests: int
    resident: int


def main(
    model: Annotated[str, typer.Option(help=f"{EMBEDDED_MODEL}, a folder, or a hub id.")] = EMBEDDED_MODEL,
    random_weights: Annotated[str, typer.Option(help="Instead, a shape with random weights: qwen3-0.6b.")] = "",
    problems: Annotated[str, typer.Option(help="A source of problems; GSM8K if it is at hand.")] = "",
    requests: Annotated[int, typer.Option(min=10, help="Captured requests.")] = 1000,
    every: Annotated[int, typer.Option(min=1, help="Requests between two readings.")] = 50,
    in_flight: Annotated[int, typer.Option(help="Requests at once.")] = 32,
    max_tokens: Annotated[int, typer.Option(help="The most to generate per prompt.")] = 8,
    capture: Annotated[str, typer.Option(help=f"What to capture: {', '.join(CAPTURES[1:])}.")] = "3x2",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    write: Annotated[bool, typer.Option("--record/--no-record", help="Update RESULTS.md.")] = True,
) -> None:
    """Measure a replica's memory."""
    if capture not in CAPTURES[1:]:
        raise typer.BadParameter(f"{capture!r} is unknown", param_hint="--capture")
    workload = Workload(model, random_weights, problems, max_tokens, dtype, device)
    stage = stage_printer()
    samples = measure_memory(workload, capture, requests, every, in_flight, stage)
    body = report(workload, capture, samples, in_flight)
    print(body)
    if write:
        record("Memory", body)


def measure_memory(
    workload: Workload, capture: str, requests: int, every: int, in_flight: int, stage: Callable[[str], None]
) -> list[MemorySample]:
    """Run captured requests and read the memory after every few."""
    model = workload.load()
    prompts = [prompt[-PROMPT_TOKENS:] for prompt in workload.prompts(model.tokenizer, min(requests, 200))]
    plan = capture_plan(model, capture)
    assert plan is not None
    positions = str(plan.positions)
    engine = TransformersEngine(model, max_batch=in_flight, max_queue=2 * in_flight, prefix_cache=False)
    process, samples = psutil.Process(), []
    room = threading.Semaphore(in_flight)
    failures: list[Exception] = []
    with tempfile.TemporaryDirectory() as folder, StoreWriter(folder) as writer:

        def committed(future: "Future[Receipt]") -> None:
            if (error := future.exception()) is not None:
                failures.append(StoreFailedError(str(error)))
            room.release()

        def callback(prompt: list[int]) -> Callable[[Event], None]:
            def listen(event: Event) -> None:
                if isinstance(event, Finished):
                    writer.submit(_rollout(model, prompt, event, positions)).add_done_callback(committed)
                elif isinstance(event, Failed):
                    failures.append(event.error)
                    room.release()

            return listen

        try:
            for number in range(requests):
                prompt = prompts[number % len(prompts)]
                room.acquire()
                sampling = Sampling(workload.max_tokens, temperature=0)
                engine.submit(GenerationJob(prompt, sampling, callback(prompt), plan))
                if (number + 1) % every == 0:
                    samples.append(MemorySample(number + 1, process.memory_info().rss))
                    stage(f"{number + 1} requests: {samples[-1].resident / 1e6:,.0f} MB")
            for _ in range(in_flight):
                room.acquire()
        finally:
            engine.close()
    if failures:
        raise failures[0]
    return samples


class StoreFailedError(Exception):
    """A rollout could not be stored."""


def _rollout(model: LoadedModel, prompt: list[int], finished: Finished, positions: str) -> CapturedRollout:
    """Make of a finished request what is stored."""
    captured = finished.captured
    assert captured is not None
    token_ids = prompt + finished.token_ids
    return CapturedRollout(
        session_id="memory",
        rollout_id=str(ULID()),
        spec=CaptureSpec(
            model=model.source.name,
            revision=model.source.revision,
            keys=tuple(captured.tensors),
            positions=positions,
            dtype=str(model.dtype),
        ),
        tensors=captured.tensors,
        position=captured.position,
        sequence=TokenizedText(
            text=finished.text,
            token_ids=token_ids,
            token_offsets=[0] * len(token_ids),
            segments=[Segment("assistant", 0, len(finished.text))],
            n_prompt=len(prompt),
        ),
        logprobs=np.array([np.nan] * len(prompt) + [score.logprob for score in finished.scores], dtype=np.float32),
        finish_reason=finished.finish_reason,
        key=None,
        labels={},
    )


def growth(samples: Sequence[MemorySample]) -> Interval:
    """Return the bytes by which memory grows per request, once it has settled.

    Raises:
        ValueError: if there are too few samples.
    """
    settled = samples[int(len(samples) * SETTLING) :]
    return slope_interval([s.requests for s in settled], [s.resident for s in settled])


def sparkline(values: Sequence[float]) -> str:
    """Draw a curve in one line, from 0 to its maximum."""
    top = max(values)
    return "".join(BARS[min(len(BARS) - 1, int(len(BARS) * value / top))] for value in values)


def report(workload: Workload, capture: str, samples: Sequence[MemorySample], in_flight: int) -> str:
    """Lay out the results in Markdown."""
    slope, last = growth(samples), samples[-1]
    total = slope.estimate * last.requests / last.resident
    verdict = "flat" if abs(total) <= FLAT else "not flat"
    rows = [[f"{s.requests:,}", f"{s.resident / 1e6:,.0f} MB"] for s in samples]
    return "\n\n".join(
        [
            f"{workload.name}, {last.requests:,} requests, capture {capture}, {in_flight} in flight, through the engine and "
            f"the store's writer. **{verdict.capitalize()}**: after the first {SETTLING:.0%} memory grows by "
            f"{slope.estimate / 1e3:.1f} kB a request (95%: {slope.low / 1e3:.1f} to {slope.high / 1e3:.1f}), "
            f"{total:.1%} of {last.resident / 1e9:.2f} GB over the run.",
            f"`{sparkline([s.resident for s in samples])}` (from 0 to {max(s.resident for s in samples) / 1e9:.2f} GB)",
            table(["requests", "resident memory"], rows),
        ]
    )


if __name__ == "__main__":
    typer.run(main)
