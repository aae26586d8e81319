"""Throughput ratios of interleaved runs in one process, so that noise affects all alike.

Each round runs every arm once, in the reverse order of the previous round. All engine arms share one engine and one copy of
the weights; transformers' `generate` and the predecessor's way share another, since two threads cannot trace one model.
"""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.column import measure_column
from benchmarks.paired_statistics import Interval, ratios
from benchmarks.ways import UnavailableError, Way, end_tokens, engine_way, generate_way, seed_way
from benchmarks.workload import Workload
from serve_app.engines.transformers.engine import TransformersEngine

IN_FLIGHT = 16
MANY = 64
SEED_PROMPTS = 2
"""The seed's way is slow; its rate needs no more prompts than these."""


@dataclass(frozen=True)
class Ratio:
    """One row of the budget."""

    what: str
    """What it compares."""
    budget: float
    """The least that the ratio should be."""
    interval: Interval
    """The ratio."""
    pairs: int
    """How many pairs."""


@dataclass(frozen=True)
class PairedArm:
    """One thing to run in each round."""

    way: Way
    prompts: list[list[int]]
    in_flight: int


def interleave(arms: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run every arm once per round, forwards and backwards in turn; returns each arm's values by round."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        for name in list(arms)[:: -1 if number % 2 else 1]:
            found[name].append(arms[name]())
    return found


def measure_pairs(workload: Workload, prompts: int, rounds: int, stage: Callable[[str], None]) -> list[Ratio]:
    """Measure the budget's ratios of tokens per second.

    Args:
        workload: what to run.
        prompts: per run of the engine.
        rounds: how many pairs.
        stage: told what is being done.
    """
    model = workload.load()
    module, tokenizer = workload.load_plain()
    texts = workload.prompts(tokenizer, prompts)
    engine = TransformersEngine(model, max_batch=IN_FLIGHT, max_queue=1024, prefix_cache=False)
    arms = {name: PairedArm(engine_way(engine, model, name), texts, IN_FLIGHT) for name in ("none", "3x2", "all")} | {
        "generate": PairedArm(generate_way(module, end_tokens(module, tokenizer)), texts, IN_FLIGHT),
        "seed": PairedArm(seed_way(module, tokenizer), texts[:SEED_PROMPTS], 1),
    }

    def runner(name: str, arm: PairedArm) -> Callable[[], float]:
        def run() -> float:
            found = arm.way(arm.prompts, workload.max_tokens, arm.in_flight)
            stage(f"{name}: {found.tokens} tokens, {found.rate:.1f}/s")
            return found.rate

        return run

    try:
        for arm in arms.values():
            arm.way(arm.prompts[: arm.in_flight], 2, arm.in_flight)
        rates = interleave({name: runner(name, arm) for name, arm in arms.items()}, rounds)
    finally:
        engine.close()
    compared = [
        ("capture of 3 layers × 2 hook points against none", 0.97, "3x2", "none"),
        ("capture of every layer's residual against none", 0.90, "all", "none"),
        ("no capture against transformers' `generate` in static batches", 1.0, "none", "generate"),
        (f"{IN_FLIGHT} in flight, 3 × 2 captured, against the seed's way", 8.0, "3x2", "seed"),
    ]
    return [Ratio(what, budget, ratios(rates[ours], rates[theirs]), rounds) for what, budget, ours, theirs in compared]


def measure_beside_vllm(workload: Workload, rounds: int, stage: Callable[[str], None]) -> list[Ratio]:
    """Measure this engine's tokens per second against those of plain vLLM, each run in a process of its own.

    Args:
        workload: what to run.
        rounds: how many pairs.
        stage: told what is being done.

    Raises:
        UnavailableError: if one of them does not run.
    """

    def runner(name: str) -> Callable[[], float]:
        def run() -> float:
            column = measure_column(name, MANY, MANY, workload)
            if column.skipped:
                raise UnavailableError(f"{name}: {column.skipped}")
            stage(f"{name}: {column.rate:.1f}/s")
            return column.rate

        return run

    rates = interleave({name: runner(name) for name in ("engine", "engine-3x2", "vllm")}, rounds)
    return [
        Ratio("no capture against vLLM", 1.0, ratios(rates["engine"], rates["vllm"]), rounds),
        Ratio("3 layers × 2 hook points against vLLM", 0.97, ratios(rates["engine-3x2"], rates["vllm"]), rounds),
    ]
