"""The cost and the guarantee of `--batch-invariant`: `python -m benchmarks.invariance`.

Two engines in one process share one copy of a model, one with the mode and one without, and alternate on the same prompts,
so that noise affects both alike. Only one of them has requests at any time, since two threads cannot trace one model.

Speed is reported as ratios. Reproducibility is counted: requests run alone, alone again, and among others, and their
tokens, log-probabilities and rows of every layer are compared bit for bit. Differences of rows are measured only where both
runs have read the same tokens, since after a different token the texts diverge.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks.paired_statistics import Interval, ratios
from benchmarks.pairs import interleave
from benchmarks.results_file import record, table
from benchmarks.stage_printer import stage_printer
from benchmarks.ways import Way, engine_way, finish_all
from benchmarks.workload import Workload, capture_plan
from roentgen.defaults import EMBEDDED_MODEL
from serve_app.engines.protocol import Finished, Sampling
from serve_app.engines.served_model import native_dtype
from serve_app.engines.transformers.engine import TransformersEngine
from serve_app.engines.transformers.invariance import settle
from serve_app.engines.transformers.loaded_model import LoadedModel
from serve_app.engines.transformers.model_cache import inspect_cache

IN_FLIGHT = 16
PROMPT_TOKENS = 48
"""Prompts are cut to their last tokens, so that the benchmark is short."""

CACHE_TOKENS = 8192
MODES = ("off", "on")


@dataclass(frozen=True)
class Price:
    """Tokens per second with the mode, as a share of those without."""

    dtype: str
    """What it is computed in."""
    in_flight: int
    """Requests at once."""
    without: float
    """Tokens per second without the mode, the median."""
    ratio: Interval
    """The share."""


@dataclass(frozen=True)
class Agreement:
    """How many requests gave the same bits in two runs."""

    requests: int
    """Requests that were compared."""
    tokens: int
    """Of these, how many have the same tokens."""
    logprobs: int
    """How many have the same log-probabilities too, to the last bit."""
    rows: int
    """How many have the same tokens and rows of every layer, to the last bit."""
    apart: float
    """The largest relative distance between two rows of the same tokens."""


@dataclass(frozen=True)
class InvarianceComparison:
    """Agreements of one kind: `mode` is on or off, `what` says which runs, `decoding` is greedy or seeded."""

    dtype: str
    mode: str
    what: str
    decoding: str
    found: Agreement


def main(
    model: Annotated[str, typer.Option(help=f"{EMBEDDED_MODEL}, a folder, or a hub id.")] = EMBEDDED_MODEL,
    random_weights: Annotated[str, typer.Option(help="Instead, a shape with random weights: llama-tiny.")] = "",
    problems: Annotated[str, typer.Option(help="A source of problems; GSM8K if it is at hand.")] = "",
    dtypes: Annotated[str, typer.Option(help="What to compute in; bfloat16 too where the machine has it.")] = "",
    pairs: Annotated[int, typer.Option(min=0, help="Rounds of interleaved runs for the speed; 0 for none.")] = 3,
    speed_tokens: Annotated[int, typer.Option(min=2, help="Tokens per completion for the speed.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens per completion for reproducibility.")] = 16,
    requests: Annotated[int, typer.Option(min=2, help="Requests at once for reproducibility.")] = 18,
    compared: Annotated[int, typer.Option(min=2, help="Of these, how many also run alone; half are greedy.")] = 8,
    threads: Annotated[int, typer.Option(min=0, help="Threads to compute with; 0 for PyTorch's choice.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    note: Annotated[str, typer.Option(help="A sentence about the machine's state for RESULTS.md.")] = "",
    write: Annotated[bool, typer.Option("--record/--no-record", help="Update RESULTS.md.")] = True,
) -> None:
    """Measure batch-invariance."""
    if compared > requests:
        raise typer.BadParameter(f"{compared} of {requests} requests cannot run alone", param_hint="--compared")
    if threads:
        torch.set_num_threads(threads)
    start, stage = time.monotonic(), stage_printer()
    place, _ = Workload(model, random_weights, problems, device=device).place()
    native = str(native_dtype(place)).removeprefix("torch.")
    chosen = dtypes.split(",") if dtypes else list(dict.fromkeys([native, "float32"]))
    settled: dict[str, list[float]] = {}
    prices: list[Price] = []
    comparisons: list[InvarianceComparison] = []
    for dtype in chosen:
        workload = Workload(model, random_weights, problems, speed_tokens, dtype, device)
        loaded = workload.load()
        prompts = [prompt[-PROMPT_TOKENS:] for prompt in workload.prompts(loaded.tokenizer, max(requests, IN_FLIGHT))]
        most = max(requests, IN_FLIGHT)
        settled[dtype] = [settle_seconds(loaded, most, dtype) for _ in range(max(1, pairs))]
        stage(f"{dtype}: the check takes {median(settled[dtype]):.1f} s")
        engines = {
            mode: TransformersEngine(
                loaded,
                max_batch=most,
                max_cache_tokens=CACHE_TOKENS,
                batch_invariant=mode == "on",
                prefix_cache=False,
            )
            for mode in MODES
        }
        try:
            if pairs:
                prices += measure_price(engines, loaded, prompts, speed_tokens, pairs, dtype, stage)
            for mode, engine in engines.items():
                comparisons += [
                    InvarianceComparison(dtype, mode, *kind)
                    for kind in measure_agreement(engine, loaded, prompts[:requests], compared, max_tokens)
                ]
                stage(f"{dtype}, mode {mode}: compared")
        finally:
            for engine in engines.values():
                engine.close()
        seconds = time.monotonic() - start
        body = report(workload.name, settled, prices, comparisons, (requests, max_tokens, speed_tokens, seconds), note)
        if write:
            record("Batch-invariance", body)  # after each dtype, so that a run that is stopped leaves what it has
    print(body)


def settle_seconds(model: LoadedModel, max_batch: int, dtype: str) -> float:
    """Return how long the check at load takes.

    Raises:
        RuntimeError: if the model would run one request at a time: then there is no mode to measure.
    """
    cache_support = inspect_cache(model.observed._module, model.device)
    start = time.perf_counter()
    shapes, reason = settle(model, cache_support, max_batch)
    seconds = time.perf_counter() - start
    if shapes is None:
        raise RuntimeError(f"{dtype}: the model runs one request at a time: {reason}")
    return seconds


def measure_price(
    engines: dict[str, TransformersEngine],
    model: LoadedModel,
    prompts: list[list[int]],
    max_tokens: int,
    rounds: int,
    dtype: str,
    stage: Callable[[str], None],
) -> list[Price]:
    """Measure tokens per second of both engines in turn, with one request and with `IN_FLIGHT` at once."""

    def runner(way: Way, name: str, count: int, in_flight: int) -> Callable[[], float]:
        def run() -> float:
            found = way(prompts[:count], max_tokens, in_flight)
            stage(f"{dtype}, {name}, {in_flight} in flight: {found.rate:.1f} tokens/s")
            return found.rate

        return run

    ways = {mode: engine_way(engine, model, "none") for mode, engine in engines.items()}
    loads = {1: 2, IN_FLIGHT: IN_FLIGHT}
    for way in ways.values():
        way(prompts[:IN_FLIGHT], 2, IN_FLIGHT)  # what is made once
    arms = {
        f"{mode} {in_flight}": runner(way, f"mode {mode}", count, in_flight)
        for in_flight, count in loads.items()
        for mode, way in ways.items()
    }
    rates = interleave(arms, rounds)
    return [Price(dtype, n, median(rates[f"off {n}"]), ratios(rates[f"on {n}"], rates[f"off {n}"])) for n in loads]


def measure_agreement(
    engine: TransformersEngine, model: LoadedModel, prompts: list[list[int]], compared: int, max_tokens: int
) -> list[tuple[str, str, Agreement]]:
    """Run requests alone, alone again, and among others; returns which runs, how tokens are chosen, and the agreement."""
    plan = capture_plan(model, "all")
    settings = [
        Sampling(max_tokens, temperature=float(number % 2), seed=number, min_tokens=max_tokens)
        for number in range(len(prompts))
    ]
    requests = list(zip(prompts, settings, strict=True))
    alone = [finish_all(engine, [request], plan)[0] for request in requests[:compared]]
    again = [finish_all(engine, [request], plan)[0] for request in requests[:compared]]
    among = finish_all(engine, requests, plan)[:compared]
    return [
        (what, decoding, agreement(prompts[:compared][first::2], alone[first::2], others[first::2]))
        for what, others in (("alone, again", again), (f"alone and among {len(prompts) - 1} others", among))
        for first, decoding in enumerate(("greedy", "seeded"))
    ]


def agreement(prompts: Sequence[list[int]], ones: Sequence[Finished], others: Sequence[Finished]) -> Agreement:
    """Compare the results of the same requests in two runs."""
    pairs = list(zip(ones, others, strict=True))
    tokens = [one.token_ids == other.token_ids for one, other in pairs]
    logprobs = [[s.logprob for s in one.scores] == [s.logprob for s in other.scores] for one, other in pairs]
    rows = [all(torch.equal(a, b) for a, b in _tensors(one, other)) for one, other in pairs]
    return Agreement(
        len(pairs),
        sum(tokens),
        sum(same and also for same, also in zip(tokens, logprobs, strict=True)),
        sum(same and also for same, also in zip(tokens, rows, strict=True)),
        max(_apart(len(prompt), *pair) for prompt, pair in zip(prompts, pairs, strict=True)),
    )


def _tensors(one: Finished, other: Finished) -> list[tuple[Tensor, Tensor]]:
    assert one.captured is not None
    assert other.captured is not None
    return [(one.captured.tensors[key], other.captured.tensors[key]) for key in one.captured.tensors]


def _apart(n_prompt: int, one: Finished, other: Finished) -> float:
    """Return the largest relative distance between two rows at one position, where both have read the same tokens."""
    pairs = zip(one.token_ids, other.token_ids, strict=False)
    same = n_prompt + next((i for i, (a, b) in enumerate(pairs) if a != b), len(one.token_ids))
    distances = []
    for a, b in _tensors(one, other):
        rows = min(same, len(a), len(b))
        a, b = a[:rows].double(), b[:rows].double()
        distances.append(float(((a - b).norm(dim=-1) / a.norm(dim=-1)).max()))
    return max(distances)


def report(
    name: str,
    settled: dict[str, list[float]],
    prices: Sequence[Price],
    comparisons: Sequence[InvarianceComparison],
    size: tuple[int, int, int, float],
    note: str,
) -> str:
    """Lay out the results in Markdown.

    Args:
        name: the model's.
        settled: seconds of the check at load, per dtype.
        prices: the mode's speed.
        comparisons: what is reproducible.
        size: requests at once and tokens of each for reproducibility, tokens for the speed, seconds of the whole.
        note: about the machine.
    """
    requests, max_tokens, speed_tokens, seconds = size
    checks = ", ".join(f"{median(times):.1f} s in {dtype}" for dtype, times in settled.items())
    times_checked = len(next(iter(settled.values())))
    speed = [
        f"Interleaved runs of {speed_tokens} tokens a request; median ratio and its {p.ratio.coverage:.0%} interval:"
        for p in prices[:1]
    ]
    if prices:
        header = ["tokens/s with the mode against without", "in flight", "without", "ratio (interval)"]
        speed.append(table(header, [[p.dtype, str(p.in_flight), f"{p.without:.1f}/s", str(p.ratio)] for p in prices]))
    return "\n\n".join(
        [
            f"{name}, the last {PROMPT_TOKENS} tokens of GSM8K-shaped prompts, the transformers engine with "
            f"`--batch-invariant` and without, in one process; {seconds / 60:.0f} minutes. The check at load takes {checks} "
            f"(median of {times_checked}). {note}".strip(),
            *speed,
            f"{requests} requests of {max_tokens} tokens, half greedy and half seeded at temperature 1; some also alone. "
            "How many have the same tokens, and also the same log-probabilities and rows of every layer, bit for bit; and the "
            "largest relative distance between two rows where the same tokens were read:",
            table(
                ["dtype", "mode", "runs", "decoding", "tokens", "log-probabilities", "rows", "rows apart"],
                [_row(comparison) for comparison in comparisons],
            ),
        ]
    )


def _row(comparison: InvarianceComparison) -> list[str]:
    found = comparison.found
    counts = [f"{count} of {found.requests}" for count in (found.tokens, found.logprobs, found.rows)]
    apart = f"{found.apart:.0e}" if found.apart else "0"
    return [comparison.dtype, comparison.mode, comparison.what, comparison.decoding, *counts, apart]


if __name__ == "__main__":
    typer.run(main)
