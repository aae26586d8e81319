"""The cost of capturing and probing in vLLM: `python -m benchmarks.fast_engine`.

The baseline is plain vLLM with its defaults: compiled, with chunked prefill and a prefix cache, returning tokens and text
through its own client. This project's engine does more even without capture: it has taps in the graph and returns the
log-probability of every token. Both run the same prompts, which share no prefix, alternately over several rounds; while one
computes, the other is idle. All engines are restarted several times, in alternating order, because equal processes differ
by some percent over their lifetime. Captured rows are on disk before a run ends. Requires the environment of `make
test-vllm`.

Each round is appended to a file, and the section is generated from the file; with `--add` it includes earlier runs, so that
concurrencies can be measured one at a time.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from benchmarks.paired_statistics import median_interval
from benchmarks.results_file import record, table
from benchmarks.stage_printer import stage_printer
from benchmarks.vllm_way import (
    MOST_TAPS,
    N_PROBES,
    TAPS,
    capturing_engine,
    keeper,
    plain_engine,
    plain_way,
    probes,
    settings,
)
from benchmarks.ways import Way, engine_way
from benchmarks.worker_times import READING, STORING, WRITER, allow_functions, ask, read_clock, start_clock
from benchmarks.workload import Workload

SECTION = "vLLM with capture"
CACHE_TOKENS = 32_768
PLAIN, NONE, PROBED = "plain", "none", "probes"
BUDGETS = {
    NONE: ("no capture, default taps", 0.98),
    "3x2": ("3 layers × 2 hook points on disk", 0.97),
    "all": ("every layer's residual on disk", 0.93),
    PROBED: (f"{N_PROBES} probes on as many layers", 0.98),
}
ALONE_BUDGET = 0.90
"""With one in flight."""
FEW, MANY = "few taps", "many taps"
PROBE_BUDGET = 0.01
"""Of the time from a token to the next."""
WAVES = {1: 6, 16: 3}
"""So many times as many prompts as in flight, where a run would else be too short; elsewhere `MOST_WAVES`."""
MOST_WAVES = 2
TAPS_AT = 16
"""In flight where the number of taps is varied."""

SETTLE_S = 1.0
"""Between runs: what one has left to its engine's other threads is no part of the next."""


@dataclass(frozen=True)
class EngineTimes:
    """One run of one arm."""

    rate: float
    """Tokens generated per second; until all rows are durable."""
    between_s: float
    """From a token to the next, in the median request."""
    shares: dict[str, float]
    """Of the run's time, what the worker spent on this project's own work (`worker_times`)."""


@dataclass(frozen=True)
class EngineRound:
    """One run of every arm, in turn."""

    in_flight: int
    start: int
    """Of the engines: rounds with one number ran in the same processes."""
    runs: dict[str, EngineTimes]
    taps: dict[str, tuple[int, int]]
    """Per engine, how many taps it has, and the bytes of their buffers."""


def main(
    in_flight: Annotated[str, typer.Option(help="Requests at once.")] = "1,16,64",
    max_tokens: Annotated[int, typer.Option(help="The most to generate per prompt.")] = 32,
    starts: Annotated[int, typer.Option(help="How often all engines are started; 0 only tells what the file has.")] = 3,
    rounds: Annotated[int, typer.Option(help="Of interleaved runs, per start and number in flight.")] = 2,
    vary_taps: Annotated[bool, typer.Option(help=f"With {TAPS_AT} in flight, also with fewer and more taps.")] = True,
    threads: Annotated[int, typer.Option(help="Of each engine on a CPU; 0 for one per core.")] = 0,
    problems: Annotated[str, typer.Option(help="A source of problems; GSM8K if it is at hand.")] = "",
    file: Annotated[Path, typer.Option(help="Every round is written here.")] = Path("results/fast_engine.jsonl"),
    add: Annotated[bool, typer.Option("--add", help="Keep the rounds that the file has.")] = False,
    write: Annotated[bool, typer.Option("--record/--no-record", help="Update RESULTS.md.")] = True,
) -> None:
    """Measure the cost of capturing in vLLM."""
    workload = Workload(max_tokens=max_tokens, problems=problems)
    numbers = tuple(map(int, in_flight.split(",")))
    stage = stage_printer()
    allow_functions()
    file.parent.mkdir(parents=True, exist_ok=True)
    if not add:
        file.write_text("")
    first = 1 + max((found.start for found in read_rounds(file)), default=-1)
    for start in range(first, first + starts):
        for found in _one_start(workload, numbers, rounds, threads, start, TAPS_AT if vary_taps else 0, stage):
            with file.open("a") as out:
                out.write(json.dumps(asdict(found)) + "\n")
            if write:
                record(SECTION, report(workload, read_rounds(file), threads))
    body = report(workload, read_rounds(file), threads)
    if write:
        record(SECTION, body)
    print(body)


def read_rounds(file: Path) -> list[EngineRound]:
    """Read the recorded rounds."""
    found = []
    for line in file.read_text().splitlines() if file.exists() else []:
        said = json.loads(line)
        runs = {name: EngineTimes(**run) for name, run in said["runs"].items()}
        taps = {name: (count, size) for name, (count, size) in said["taps"].items()}
        found.append(EngineRound(said["in_flight"], said["start"], runs, taps))
    return found


def _one_start(
    workload: Workload,
    numbers: tuple[int, ...],
    rounds: int,
    threads: int,
    start: int,
    vary_at: int,
    stage: Callable[[str], None],
) -> Iterator[EngineRound]:
    """Start the engines and run them in turns; with `vary_at` requests in flight also those with fewer and more taps."""
    tokenizer, most = workload.tokenizer(), max(numbers)
    with TemporaryDirectory() as folder, ExitStack() as stack:
        arms: dict[str, FastEngineArm] = {}
        taps: dict[str, tuple[int, int]] = {}
        kinds = [PLAIN, NONE] + ([FEW, MANY] if vary_at in numbers else [])
        engines = _BenchEngines(workload, most, Path(folder), threads)
        for kind in kinds[:: -1 if start % 2 else 1]:
            stack.enter_context(engines.started(kind, arms, taps))
            stage(f"{kind}: its engine is there")
        for number in numbers:
            prompts = workload.prompts(tokenizer, number * WAVES.get(number, MOST_WAVES))
            named = {name: arms[name] for name in (PLAIN, *BUDGETS)}
            named |= {kind: arms[kind] for kind in kinds[2:] if number == vary_at}
            for arm in named.values():
                arm.run(prompts[: min(number, 8)], 2, number)

            def measure(
                name: str, arm: "FastEngineArm", prompts: list[list[int]] = prompts, number: int = number
            ) -> EngineTimes:
                time.sleep(SETTLE_S)
                found = arm.run(prompts, workload.max_tokens, number)
                stage(f"{number} in flight, {name}: {found.rate:.1f}/s, {found.between_s * 1e3:.2f} ms, {found.shares}")
                return found

            for turn in range(rounds):
                order = list(named)[:: -1 if turn % 2 else 1]
                yield EngineRound(number, start, {name: measure(name, named[name]) for name in order}, taps)


@dataclass(frozen=True)
class FastEngineArm:
    """One thing to run in each round."""

    way: Way
    clock: Callable[[], dict[str, float]]
    """Reads the worker's clock; nothing where it has none."""

    def run(self, prompts: list[list[int]], max_tokens: int, in_flight: int) -> EngineTimes:
        """Run it once."""
        before = self.clock()
        found = self.way(prompts, max_tokens, in_flight)
        spent = {what: seconds - before.get(what, 0.0) for what, seconds in self.clock().items()}
        shares = {what: round(seconds / found.seconds, 5) for what, seconds in spent.items()}
        return EngineTimes(found.rate, median(found.between_s), shares)


@dataclass(frozen=True)
class _BenchEngines:
    """What is started."""

    workload: Workload
    in_flight: int
    folder: Path
    threads: int

    @contextmanager
    def started(self, kind: str, arms: dict[str, FastEngineArm], taps: dict[str, tuple[int, int]]) -> Iterator[None]:
        """Start one engine, and add the arms that it runs."""
        declared = {FEW: TAPS[:1], MANY: MOST_TAPS}.get(kind, TAPS)
        given = settings(self.workload, self.in_flight, self.folder / kind, CACHE_TOKENS, self.threads, declared)
        if kind == PLAIN:
            with plain_engine(self.workload.model, given) as loop:
                arms[PLAIN] = FastEngineArm(plain_way(loop), dict)
                yield
            return
        with capturing_engine(self.workload.model, given) as (model, engine):
            taps[kind] = ask(engine, start_clock)

            def clock() -> dict[str, float]:
                return dict(ask(engine, read_clock))

            if kind == NONE:
                keep = keeper(model, engine)
                for capture in (NONE, "3x2", "all"):
                    arms[capture] = FastEngineArm(engine_way(engine, model, capture, keep), clock)
                arms[PROBED] = FastEngineArm(engine_way(engine, model, NONE, probes=probes(model)), clock)
            else:
                arms[kind] = FastEngineArm(engine_way(engine, model, NONE), clock)
            yield


def report(workload: Workload, rounds: list[EngineRound], threads: int) -> str:
    """Lay out what has been measured in Markdown."""
    from vllm import __version__ as vllm_version

    dtype = str(workload.place()[1]).removeprefix("torch.")
    rows, shares, counts = [], [], []
    for number in sorted({one.in_flight for one in rounds}):
        here = [one for one in rounds if one.in_flight == number]
        for name, (what, budget) in BUDGETS.items():
            least = f"{budget if number > 1 else ALONE_BUDGET}×"
            rows.append([str(number), what, least, *_compared(here, _against_plain(name))])
            spent = [median(one.runs[name].shares[key] for one in here) for key in (READING, STORING, WRITER)]
            shares.append([str(number), what, *(f"{share:.1%}" for share in spent)])
        slower = _compared(here, lambda run: run[PROBED].between_s / run[NONE].between_s)
        rows.append([str(number), "from token to token, with probes against none", f"{1 + PROBE_BUDGET}×", *slower])
        varied = [one for one in here if FEW in one.runs]
        for kind in (FEW, NONE, MANY) if varied else ():
            count, size = varied[-1].taps[kind]
            compared = _compared(varied, _against_plain(kind))
            counts.append([str(count), f"{size / 1e6:,.0f} MB", *compared])
    parts = [
        f"{workload.name}, {dtype}, GSM8K prompts without examples ({MOST_WAVES} times as many as in flight; with 1 and "
        f"{TAPS_AT} in flight {WAVES[1]} and {WAVES[TAPS_AT]} times), at most {workload.max_tokens} tokens, greedy, "
        f"{threads or 'all'} threads, vLLM {vllm_version}, compiled. Plain vLLM has its defaults, chunked prefill and a prefix "
        "cache (emptied before each run) among them, and tells tokens and text. This project's engine has "
        f"{', '.join(TAPS)} of every layer tapped, and tells log-probabilities too. Median ratio of tokens/s of the same "
        "round, and its interval (at least 90 % where there are five pairs):",
        table(
            ["in flight", "against plain vLLM", "budget", "median (interval)", "pairs", "starts of all engines"], rows
        ),
        "Shares of a run's time, in the median: of the thread that runs the model, what laying out steps, reading taps and "
        "scoring takes, and handing rows over; and how long the writer's threads computed, which have no core of their own:",
        table(["in flight", "", "reading", "handing over", "writer"], shares),
    ]
    if counts:
        parts += [
            f"Taps that nobody reads, {TAPS_AT} in flight, and what their buffers take:",
            table(["taps", "buffers", "against plain vLLM", "pairs", "starts"], counts),
        ]
    return "\n\n".join(parts)


def _against_plain(name: str) -> Callable[[dict[str, EngineTimes]], float]:
    return lambda runs: runs[name].rate / runs[PLAIN].rate


def _compared(rounds: list[EngineRound], ratio: Callable[[dict[str, EngineTimes]], float]) -> list[str]:
    """Return the median of a ratio with its interval, over how many rounds, and over how many starts."""
    found = median_interval([ratio(one.runs) for one in rounds])
    return [str(found), str(len(rounds)), str(len({one.start for one in rounds}))]


if __name__ == "__main__":
    typer.run(main)
