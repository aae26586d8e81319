"""The vLLM engine's part of the GPU benchmark, in its own process with a time limit.

vLLM reserves a GPU's memory, may hang, and requires the server's packages; the rest of the benchmark should not depend on
any of that. So it runs separately (`python -m benchmarks.gpu_vllm TASK`, called by `gpu`) and writes each part as a line of
JSON when it ends.

Rows come first: requests of different lengths and position policies, with 1, 8 and 64 in flight, whose taps are in real
CUDA graphs, full ones for decoding and piecewise ones for prefill. They are checked like those of the transformers engine
(`gpu_rows`). A check that cannot fail proves nothing, so the buffer of one tap is then replaced by its previous contents:
the check must detect it at this tap and nowhere else. Then speed: plain vLLM and this project's engine on the same GPU,
alternately.
"""

import json
import logging
import queue
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.gpu_report import Part
from benchmarks.gpu_rows import RowComparison, RowRequest, checked_keys, make_requests
from benchmarks.gpu_speed import PROMPT_TOKENS, WARM_UP_TOKENS, DidNotFitError, fitting, random_prompts
from benchmarks.paired_statistics import ratios
from benchmarks.vllm_way import capturing_engine, keeper, plain_engine, plain_way, probes, settings
from benchmarks.ways import MeasuredRun, OutOfTimeError, Way, engine_way
from benchmarks.worker_times import READING, STORING, WRITER, allow_functions, ask, read_clock, start_clock
from benchmarks.workload import RANDOM_MODELS, Workload
from roentgen.contract import stored_key
from serve_app.capture.rows import CapturedRows
from serve_app.engines.protocol import Failed, Finished, GenerationJob
from serve_app.engines.vllm.engine import VllmEngine
from serve_app.engines.vllm.loading import VllmModel

ROWS, SPEED = "vllm rows", "vllm speed"
ROWS_IN_FLIGHT = (1, 8, 64)
COSINE = 0.999
"""The smallest that a row's may be to the float32 forward's, or as small as the plain forward's own."""
PLAIN_SHARE = 0.3
"""Of a GPU's memory, for vLLM beside this project's engine, which has taken what it needs."""


@dataclass(frozen=True)
class VllmTask:
    """What to do."""

    model: str
    dtype: str
    device: str
    in_flight: tuple[int, ...]
    """For speed; rows are checked with at most as many requests as the largest."""
    max_tokens: int
    rounds: int
    seconds: float
    """All there is."""
    file: str
    """Where the parts go."""


class Tasked:
    """Runs the parts."""

    def __init__(self, task: VllmTask, folder: Path) -> None:
        """Prepare."""
        self._task = task
        self._end = time.monotonic() + task.seconds
        self._workload = Workload(random_weights=task.model, dtype=task.dtype, device=task.device)
        self._saved = self._workload.saved(folder)
        # 64 requests are compared whatever is measured, so that there is something to batch.
        self._most = max(*task.in_flight, *self._row_numbers)
        longest = max(PROMPT_TOKENS[1] + task.max_tokens, 512)
        layers = RANDOM_MODELS[task.model]["num_hidden_layers"]
        self._given = replace(
            settings(self._workload, self._most, folder, self._most * longest, taps=tuple(checked_keys(layers))),
            max_queue=4 * self._most,
        )

    @property
    def _row_numbers(self) -> tuple[int, ...]:
        return tuple(number for number in ROWS_IN_FLIGHT if number <= max(self._task.in_flight))

    def run(self) -> None:
        """Run all parts."""
        allow_functions()
        name = self._saved.model
        with capturing_engine(name, self._given) as (model, engine):
            self._part(ROWS, self._task.model, lambda: self._rows(model, engine))
            others = {"gpu_memory_utilization": PLAIN_SHARE} if model.device.type == "cuda" else {}
            # Taps as a server has them whom nobody told which: those of the rows' check are here too.
            ask(engine, start_clock)
            with plain_engine(name, self._given, **others) as loop:
                for left, number in zip(range(len(self._task.in_flight), 0, -1), self._task.in_flight, strict=True):
                    until = time.monotonic() + (self._end - time.monotonic()) / left
                    ways = _ways(model, engine, plain_way(loop, self._end), self._end)
                    speed = partial(self._speed, model, engine, ways, number, until)
                    self._part(SPEED, f"{self._task.model}, {number} in flight", speed)

    def _part(self, name: str, of: str, run: Callable[[], dict[str, Any]]) -> None:
        start, result, status, reason = time.monotonic(), {}, "ok", ""
        try:
            with fitting():
                result = run()
        except DidNotFitError as error:
            status, reason = "did not fit", str(error)
        except OutOfTimeError as error:
            status, reason = "not run", str(error)
        except Exception as error:
            logging.exception("%s failed", name)
            status, reason = "failed", f"{type(error).__name__}: {error}"
        if result.get("problems"):
            status, reason = "wrong", str(result["problems"][0])
        part = Part(name, of, status, time.monotonic() - start, result, reason)  # type: ignore[arg-type]
        with Path(self._task.file).open("a") as file:
            file.write(json.dumps(asdict(part)) + "\n")

    def _rows(self, model: VllmModel, engine: VllmEngine) -> dict[str, Any]:
        """Generate with several numbers in flight, and judge the rows."""
        torch.set_float32_matmul_precision("highest")  # the judge must not compute in TensorFloat-32
        ask(engine, count_graphs)
        comparison = RowComparison(model.dtype, [])
        module, _ = self._saved.load_plain()
        few = make_requests(model)
        for number in self._row_numbers:
            requests = (
                few[:4] if number == 1 else [_again(one, copy) for copy in range(-(-number // len(few))) for one in few]
            )
            for request, finished in _generate(model, engine, requests, number, self._end):
                comparison.add(request, finished, module, model.device)
        check = comparison.judge(self._task.model, dict.fromkeys(self._row_numbers, 0))
        graphs = ask(engine, graphs_counted)
        if model.device.type == "cuda" and not {"FULL", "PIECEWISE"} & graphs.keys():
            check.problems.append(f"no step ran in a CUDA graph, but in {graphs}")
        check.problems.extend(
            f"{key.key}: a row's cosine to the float32 forward's is {key.cosine:.4f}; the plain forward's are at least "
            f"{key.plain_cosine:.4f}"
            for key in check.keys
            if not key.cosine >= min(COSINE, 1 - 3 * (1 - key.plain_cosine))
        )
        stale, found = self._control(model, engine, few[:4], module)
        if found != {stale}:
            check.problems.append(
                f"the tap {stale} showed old rows, and wrong rows were found of {sorted(found) or 'none'}"
            )
        return asdict(check) | {"graphs": graphs, "control": sorted(found)}

    def _control(
        self, model: VllmModel, engine: VllmEngine, requests: list[RowRequest], module: torch.nn.Module
    ) -> tuple[str, set[str]]:
        """Replace one tap's buffer by what it holds now; returns its key, and the keys of which wrong rows were then found."""
        key = stored_key("resid_post", model.structure.num_layers // 2)
        ask(engine, go_stale, str(model.structure.taps[key]))
        comparison = RowComparison(model.dtype, [])
        try:
            for request, finished in _generate(model, engine, requests, len(requests), self._end):
                comparison.add(request, finished, module, model.device)
        finally:
            ask(engine, go_fresh)
        return key, {wrong.key for wrong in comparison.judge(self._task.model, {}).wrong}

    def _speed(
        self, model: VllmModel, engine: VllmEngine, ways: dict[str, Way], in_flight: int, until: float
    ) -> dict[str, Any]:
        """Run every way in turn, round after round, as long as there is time."""
        prompts = random_prompts(model.vocab_size, in_flight if in_flight > 1 else 3)
        found: dict[str, list[MeasuredRun]] = {name: [] for name in ways}
        shares: dict[str, dict[str, float]] = {}
        for way in ways.values():
            way(prompts, WARM_UP_TOKENS, in_flight)
        for number in range(self._task.rounds):
            began = time.monotonic()
            for name in list(ways)[:: -1 if number % 2 else 1]:
                before = ask(engine, read_clock)
                run = ways[name](prompts, self._task.max_tokens, in_flight)
                spent = ask(engine, read_clock)
                found[name].append(run)
                shares[name] = {
                    what: (spent.get(what, 0.0) - before.get(what, 0.0)) / run.seconds
                    for what in (READING, STORING, WRITER)
                }
            now = time.monotonic()
            if now + (now - began) > until:
                break
        base = [run.rate for run in found["plain"]]
        arms = []
        for name, runs in found.items():
            rates = [run.rate for run in runs]
            between = median(seconds for run in runs for seconds in run.between_s)
            ratio = asdict(ratios(rates, base)) if name != "plain" else None
            arms.append({"arm": name, "rates": rates, "ratio": ratio, "between_s": between, "shares": shares[name]})
        return {"in_flight": in_flight, "arms": arms}


def _ways(model: VllmModel, engine: VllmEngine, plain: Way, end: float) -> dict[str, Way]:
    keep = keeper(model, engine)
    captured = {name: engine_way(engine, model, name, keep, end) for name in ("none", "3x2", "all")}
    return {"plain": plain, **captured, "probes": engine_way(engine, model, "none", None, end, probes(model))}


def _again(request: RowRequest, copy: int) -> RowRequest:
    """Return the same request with other tokens to come."""
    number = request.number + 16 * copy
    return replace(request, number=number, sampling=replace(request.sampling, seed=number))


def _generate(
    model: VllmModel, engine: VllmEngine, requests: list[RowRequest], in_flight: int, end: float
) -> Iterator[tuple[RowRequest, Finished]]:
    """Run requests, so many at once, and give each with the rows that the store has of it.

    Raises:
        OutOfTimeError: if there is no time left.
    """
    events: queue.SimpleQueue[tuple[RowRequest, Finished | Failed]] = queue.SimpleQueue()
    keep = keeper(model, engine)

    def submit(request: RowRequest) -> None:
        def listen(event: Any) -> None:
            if isinstance(event, Finished | Failed):
                events.put((request, event))

        engine.submit(GenerationJob(request.prompt_ids, request.sampling, listen, request.plan))

    waiting = list(requests)[::-1]
    for _ in range(min(in_flight, len(waiting))):
        submit(waiting.pop())
    ended = []
    for _ in requests:
        try:
            request, event = events.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            raise OutOfTimeError("the time was over") from None
        if isinstance(event, Failed):
            raise event.error
        ended.append((request, event, keep(request.prompt_ids, event) if request.plan is not None else None))
        if waiting:
            submit(waiting.pop())
    for request, event, stored in ended:
        if stored is None:
            yield request, event
            continue
        reply = stored.result(60).reply
        shard = load_file(f"{reply['uri'].removeprefix('file://')}/{reply['shard']}")
        rows = slice(reply["row_start"], reply["row_stop"])
        tensors = {key: shard[key][rows] for key in reply["tensors"]}
        yield request, replace(event, captured=CapturedRows(tensors, shard["position"][rows].numpy()))


def count_graphs(worker: Any) -> None:
    """Count, in a worker, the steps by how they are run: in a whole graph, in pieces, or without."""
    dispatcher = worker.model_runner.cudagraph_dispatcher
    right, counted = dispatcher.dispatch, Counter[str]()

    def dispatch(*args: Any, **kwargs: Any) -> Any:
        mode, described = right(*args, **kwargs)
        counted[mode.name] += 1
        return mode, described

    dispatcher.dispatch, dispatcher.roentgen_counted = dispatch, counted


def graphs_counted(worker: Any) -> dict[str, int]:
    """Return what has been counted."""
    return dict(worker.model_runner.cudagraph_dispatcher.roentgen_counted)


def go_stale(worker: Any, place: str) -> None:
    """Have one tap of a worker show, from now on, what its buffer holds now."""
    taps = worker.model_runner.batch.taps
    stale = next(tap for tap in taps.taps if str(tap) == place)
    show = taps.rows
    held = show(stale, None).clone()
    taps.rows = lambda tap, n: held[:n] if tap == stale else show(tap, n)


def go_fresh(worker: Any) -> None:
    """Have all taps show their buffers again."""
    del worker.model_runner.batch.taps.rows


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    given = json.loads(sys.argv[1])
    with TemporaryDirectory() as folder:
        Tasked(VllmTask(**{**given, "in_flight": tuple(given["in_flight"])}), Path(folder)).run()
