"""The engine compared with other ways to generate and capture: `python -m benchmarks.engine`.

First the table: each way in its own process, on the same prompts. Then the pairs: the cost of capturing, and the gain of
batching over the tool that this project replaces, as ratios of interleaved runs.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.column import WAYS, Column, measure_column
from benchmarks.limits import Limits, measure_limits
from benchmarks.pairs import IN_FLIGHT, MANY, Ratio, measure_beside_vllm, measure_pairs
from benchmarks.results_file import record, table
from benchmarks.stage_printer import stage_printer
from benchmarks.workload import Workload
from roentgen.atomic_files import write_json
from roentgen.defaults import EMBEDDED_MODEL

PAIR_PROMPTS = IN_FLIGHT * 3 // 2
"""More prompts than concurrent requests, as in an evaluation: finished requests make room for new ones."""


def main(
    model: Annotated[str, typer.Option(help=f"{EMBEDDED_MODEL}, a folder, or a hub id.")] = EMBEDDED_MODEL,
    random_weights: Annotated[str, typer.Option(help="Instead, a shape with random weights: qwen3-0.6b.")] = "",
    problems: Annotated[str, typer.Option(help="A source of problems; GSM8K if it is at hand.")] = "",
    in_flight: Annotated[str, typer.Option(help="Requests at once.")] = "1,16,64",
    columns: Annotated[str, typer.Option(help="Ways to run.")] = ",".join(WAYS),
    prompts: Annotated[int, typer.Option(help="Per column; 0 for as many as in flight, and 3 where that is 1.")] = 0,
    max_tokens: Annotated[int, typer.Option(help="The most to generate per prompt.")] = 48,
    pairs: Annotated[int, typer.Option(help="Rounds of interleaved runs; 0 for none.")] = 5,
    beside_vllm: Annotated[int, typer.Option(help="Rounds of the engine and vLLM in turn, with many in flight.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write everything here.")] = None,
    write: Annotated[bool, typer.Option("--record/--no-record", help="Update RESULTS.md.")] = True,
) -> None:
    """Measure the engine."""
    workload = Workload(model, random_weights, problems, max_tokens, dtype, device)
    stage = stage_printer()
    names = [name for name in columns.split(",") if name]
    unknown = [name for name in names if name not in WAYS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is unknown; there are {', '.join(WAYS)}", param_hint="--columns")
    limits = measure_limits(*workload.place())
    found: list[Column] = []
    for at_once in map(int, in_flight.split(",")):
        for name in names:
            if name == "seed" and at_once > 1:
                continue  # one request at a time is all it does
            column = measure_column(name, at_once, prompts or max(3, at_once), workload)
            stage(f"{name}, {at_once} in flight: {column.skipped or f'{column.rate:.1f} tokens/s'}")
            found.append(column)
    measured = measure_pairs(workload, PAIR_PROMPTS, pairs, stage) if pairs else []
    beside = measure_beside_vllm(workload, beside_vllm, stage) if beside_vllm else []
    again = measure_limits(*workload.place())  # a machine that was busy at the start would look slower than it is
    limits = Limits(max(limits.bytes_per_s, again.bytes_per_s), max(limits.flops, again.flops))
    body = report(workload, limits, found, measured, beside)
    print(body)
    if write:
        record("Engine", body)
    if json_file is not None:
        everything = {
            "workload": asdict(workload),
            "limits": asdict(limits),
            "columns": [asdict(column) for column in found],
            "ratios": [asdict(ratio) for ratio in [*measured, *beside]],
        }
        write_json(json_file, everything)


def report(workload: Workload, limits: Limits, columns: list[Column], pairs: list[Ratio], beside: list[Ratio]) -> str:
    """Lay out the results in Markdown."""
    dtype = str(workload.place()[1]).removeprefix("torch.")
    parts = [
        f"{workload.name}, {dtype}, at most {workload.max_tokens} tokens per GSM8K-shaped prompt, greedy, with real stopping. "
        f"The machine reads weights at {limits.bytes_per_s / 1e9:.1f} GB/s and computes {limits.flops / 1e9:,.0f} GFLOP/s, "
        "both measured in this run; the last column is the least time that these allow for the workload, as a share of "
        "the time it took.",
    ]
    if columns:
        header = ["way", "in flight", "tokens/s", "first token, median", "p95", "peak memory", "of the machine's limit"]
        parts.append(table(header, [_row(column, limits) for column in columns if not column.skipped]))
        if any(column.way.startswith("vllm") and not column.skipped for column in columns):
            parts.append(
                "`vllm` stores and detokenizes nothing. `vllm-3x2` and `vllm-all` are this project's engine, compiled as "
                "well, with taps in its graph; what they capture is on the disk within the time measured, and their peak "
                "memory is of the replica's process alone: the model is in another."
            )
        parts += [f"{c.way}, {c.in_flight} in flight: skipped, {c.skipped}" for c in columns if c.skipped]
    for ratios, how in (
        (pairs, f"Interleaved runs of one process, {PAIR_PROMPTS} prompts, {IN_FLIGHT} in flight"),
        (beside, f"Processes in turn, {MANY} prompts, {MANY} in flight"),
    ):
        if ratios:
            parts.append(f"{how}; median ratio and its {ratios[0].interval.coverage:.0%} interval:")
            rows = [[r.what, f"{r.budget}×", str(r.interval), str(r.pairs)] for r in ratios]
            parts.append(table(["ratio of tokens/s", "budget", "median (interval)", "pairs"], rows))
    return "\n\n".join(parts)


def _row(column: Column, limits: Limits) -> list[str]:
    assert column.weights is not None
    least = limits.generation_s(column.weights, column.prompts, column.prompt_tokens, column.tokens, column.in_flight)
    return [
        column.way,
        str(column.in_flight),
        f"{column.rate:.1f}",
        f"{column.first_token_s:.2f} s",
        f"{column.first_token_p95_s:.2f} s",
        f"{column.peak_bytes / 1e9:.2f} GB",
        f"{least / column.seconds:.0%}",
    ]


if __name__ == "__main__":
    typer.run(main)
