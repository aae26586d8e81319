"""What capturing costs in vLLM, beside vLLM that captures nothing and nnsight's own way: `python -m benchmarks.fast_engine`.

Engines with the same settings are loaded into processes of their own, and run one after the other, round after round: vLLM as
it is, the same with what an engine that captures does without, this project's, and nnsight's with a block that is installed
once and runs for every request. All are started anew a few times, since equal processes differ by some per cent as long as
they live; what has no budget is run once per start. A run is long enough that the commit after its last token is little of it,
as it is of an evaluation. Needs the environment that `make test-vllm` makes. What is captured by this project's engine is on
the disk before a run has ended; what nnsight captures has been handed to this process.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import nnsight
import typer
from transformers import AutoConfig

from benchmarks.pairs import Ratio, interleave
from benchmarks.record import record, table
from benchmarks.stages import stage_printer
from benchmarks.statistics import ratios
from benchmarks.vllm_way import capturing_engine, keeper, settings
from benchmarks.ways import Run, Way, engine_way
from benchmarks.workload import Workload
from serve_app.engines.protocol import PrefixCaching
from serve_app.engines.vllm.engine import EngineLoop, VllmEngine
from serve_app.engines.vllm.loading import VllmModel, engine_arguments
from serve_app.models.sources import locate

CACHE_TOKENS = 32_768

SWITCHES = {"enable_prefix_caching": True, "enable_chunked_prefill": True}
"""What an engine that captures does without."""

BESIDE = "plain, beside the rest"

SETTLE_S = 2.0
"""Between runs: what one has left to its engine's other threads is no part of the next."""


def main(
    in_flight: Annotated[int, typer.Option(help="Requests at once.")] = 32,
    waves: Annotated[
        int, typer.Option(help="So many times as many prompts per run: the last of them end with fewer.")
    ] = 8,
    max_tokens: Annotated[int, typer.Option(help="The most to generate per prompt.")] = 32,
    starts: Annotated[int, typer.Option(help="How often all engines are started: each has its luck with memory.")] = 3,
    rounds: Annotated[int, typer.Option(help="Of interleaved runs of what has a budget, per start.")] = 4,
    threads: Annotated[int, typer.Option(help="Of each engine on a CPU; 0 for one per core.")] = 0,
    write: Annotated[bool, typer.Option("--record/--no-record", help="Update RESULTS.md.")] = True,
) -> None:
    """Measure what capturing costs in vLLM."""
    workload = Workload(max_tokens=max_tokens)
    prompts = workload.prompts(workload.tokenizer(), waves * in_flight)
    stage = stage_printer()
    rates: dict[str, list[float]] = {}
    for _ in range(starts):
        for name, measured in _one_start(workload, prompts, max_tokens, in_flight, rounds, threads, stage).items():
            rates.setdefault(name, []).extend(measured)
    dtype = str(workload.place()[1]).removeprefix("torch.")
    compared = [
        ("with prefix caching and chunked prefill, no capture", 0.0, "switched on", BESIDE),
        ("no capture", 1.0, "none", "plain"),
        ("capture of 3 layers × 2 hook points", 0.97, "3x2", "plain"),
        ("capture of every layer's residual", 0.90, "all", "plain"),
        ("the same, by a block of nnsight's per request", 0.0, "nnsight", BESIDE),
    ]
    found = [
        Ratio(what, budget, ratios(rates[ours], rates[theirs]), len(rates[ours]))
        for what, budget, ours, theirs in compared
    ]
    from vllm import __version__ as vllm_version

    coverage = found[1].interval.coverage
    body = "\n\n".join(
        [
            f"{workload.name}, {dtype}, {waves * in_flight} GSM8K prompts, {in_flight} in "
            f"flight, at most {max_tokens} tokens, greedy, {threads or 'all'} threads, vLLM {vllm_version}. Engines are eager, "
            "without prefix caching and chunked prefill; what this project captures is on a disk within the time measured. "
            f"{starts} starts of all engines, {rounds} rounds of interleaved runs of what has a budget and one of the rest; "
            f"median ratio to plain vLLM's tokens/s and its interval ({coverage:.0%} where there is a budget):",
            table(
                ["against plain vLLM", "budget", "median (interval)", "pairs"],
                [[r.what, f"{r.budget}×" if r.budget else "", str(r.interval), str(r.pairs)] for r in found],
            ),
        ]
    )
    print(body)
    if write:
        record("vLLM with capture", body)


def _one_start(
    workload: Workload,
    prompts: list[list[int]],
    max_tokens: int,
    in_flight: int,
    rounds: int,
    threads: int,
    stage: Callable[[str], None],
) -> dict[str, list[float]]:
    """Start the engines and run them in turns; returns each way's tokens/s."""
    with TemporaryDirectory() as folder, ExitStack() as stack:
        model, engine = stack.enter_context(
            capturing_engine(workload, in_flight, Path(folder), cache_tokens=CACHE_TOKENS, threads=threads)
        )
        stage("this project's engine is there")
        _, plain = stack.enter_context(_plain(model, workload, in_flight))
        stage("plain vLLM is there")
        loop, switched_on = stack.enter_context(_plain(model, workload, in_flight, **SWITCHES))
        stage("vLLM with its switches on is there")
        keep = keeper(model, engine)
        budgeted: dict[str, Way] = {
            "plain": engine_way(plain, model, "none"),
            "none": engine_way(engine, model, "none"),
            "3x2": engine_way(engine, model, "3x2", keep),
            "all": engine_way(engine, model, "all", keep),
        }
        rest: dict[str, Way] = {
            BESIDE: budgeted["plain"],
            "switched on": _from_empty(loop, engine_way(switched_on, model, "none")),
            "nnsight": stack.enter_context(_nnsight(model, workload, in_flight)),
        }
        stage("nnsight's engine is there")

        def arm(name: str, way: Way) -> Callable[[], float]:
            def run() -> float:
                time.sleep(SETTLE_S)
                found = way(prompts, max_tokens, in_flight)
                stage(f"{name}: {found.tokens} tokens, {found.rate:.1f}/s")
                return found.rate

            return run

        for way in (*budgeted.values(), *rest.values()):
            way(prompts[:4], 2, 4)
        measured = interleave({name: arm(name, way) for name, way in budgeted.items()}, rounds)
        return measured | interleave({name: arm(name, way) for name, way in rest.items()}, 1)


@contextmanager
def _plain(
    model: VllmModel, workload: Workload, in_flight: int, **switches: bool
) -> Iterator[tuple[EngineLoop, VllmEngine]]:
    """Start vLLM as it is, with the settings of an engine that captures but for some switches."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    path, arguments = _arguments(workload, in_flight)
    arguments |= switches
    loop = EngineLoop(lambda: AsyncLLM.from_engine_args(AsyncEngineArgs(model=path, enforce_eager=True, **arguments)))
    engine = VllmEngine(
        loop,
        model,
        capacity=arguments["max_model_len"],
        captures=False,
        max_batch=in_flight,
        max_queue=1024,
        prefix_cache=PrefixCaching(arguments["enable_prefix_caching"]),
    )
    try:
        yield loop, engine
    finally:
        engine.close()


def _from_empty(loop: EngineLoop, way: Way) -> Way:
    """Have each run begin with an empty prefix cache: in another run's, it would find every prompt whole."""

    def run(prompts: list[list[int]], max_tokens: int, in_flight: int) -> Run:
        loop.run(loop.client.reset_prefix_cache)  # type: ignore[attr-defined]
        return way(prompts, max_tokens, in_flight)

    return run


@contextmanager
def _nnsight(model: VllmModel, workload: Workload, in_flight: int) -> Iterator[Way]:
    """Start nnsight's engine with a block that reads every layer's residual stream of every request."""
    from nnsight.modeling.vllm import VLLM
    from vllm import TokensPrompt

    class OnCpu(VLLM):
        """nnsight's vLLM, on a CPU if need be."""

        _WORKER_CLS = (
            VLLM._WORKER_CLS if model.device.type == "cuda" else "benchmarks.nnsight_cpu_worker.NnsightCpuWorker"
        )

    path, arguments = _arguments(workload, in_flight)
    made: list[Any] = []

    def make() -> Any:
        made.append(OnCpu(path, mode="async", dispatch=True, **arguments))
        return made[0].vllm_entrypoint

    loop = EngineLoop(make)
    wrapped = made[0]

    async def install() -> None:
        async with wrapped.edit() as (tracer, _):
            rows = nnsight.save([])
            for _ in tracer.iter[:]:
                for layer in wrapped.model.layers:
                    rows.append(layer.output[0] + layer.output[1])

    loop.run(install)

    def run(prompts: list[list[int]], max_tokens: int, in_flight: int) -> Run:
        start = time.perf_counter()
        outputs = loop.run(
            lambda: wrapped.generate(
                [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
                max_tokens=max_tokens,
                temperature=0.0,
                stop_token_ids=sorted(model.eos_token_ids),
                ignore_eos=True,
                detokenize=False,
                logprobs=0,
            )
        )
        tokens = 0
        for prompt, output in zip(prompts, outputs, strict=True):
            said = len(output.outputs[0].token_ids)
            kept = sum(len(part) for part in output.saves["rows"])
            if kept != (len(prompt) + said - 1) * model.structure.num_layers:
                raise RuntimeError(f"nnsight kept {kept} rows of {len(prompt)} + {said} tokens")
            tokens += said
        return Run(sum(map(len, prompts)), tokens, time.perf_counter() - start, [])

    try:
        yield run
    finally:
        loop.client.shutdown()
        loop.stop()


def _arguments(workload: Workload, in_flight: int) -> tuple[str, dict[str, Any]]:
    """Return the model's path and vLLM's arguments, those of this project's engine."""
    path = locate(workload.model).path
    place, kind = workload.place()
    given = settings(workload, in_flight, Path(), cache_tokens=CACHE_TOKENS)
    return path, engine_arguments(AutoConfig.from_pretrained(path), given, place, kind)


if __name__ == "__main__":
    typer.run(main)
