"""Checks and measures both engines on a GPU with random weights: `make bench-gpu`, or `python -m benchmarks.gpu`.

It requires torch, transformers, nnsight, jaxtyping and psutil, but no network and no model files. The part of the vLLM
engine requires vLLM for this device and the server's packages, and is skipped without them; it runs in its own process
(`gpu_vllm`). The rows of a model are checked first, and vLLM's speed is measured with its rows; then follow the other rows,
copies to the host, speed and memory. Each part is written when it ends (`gpu_report`), so results survive later failures.
The time is limited: parts that have not ended by then are listed as not run. Without a GPU, or with `--tiny`, a tiny model
takes the same path, to show that the benchmark works; its numbers mean nothing.

The exit code is 1 if a row is wrong, a part failed, or no rows could be checked.
"""

import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer

from benchmarks.gpu_report import SECTION, GpuReport, Part, Status
from benchmarks.gpu_rows import check_rows, release
from benchmarks.gpu_speed import DidNotFitError, fitting, group_json, measure_copies, measure_group
from benchmarks.results_file import RESULTS, installed, machine
from benchmarks.ways import OutOfTimeError
from benchmarks.workload import RANDOM_MODELS, Workload
from serve_app.engines.transformers.loaded_model import LoadedModel

log = logging.getLogger(__name__)

RESERVE_S = 5.0
"""Kept for what comes after the last part."""
VLLM_SHARE = 0.55
"""Of the time that is left after the first model's rows, for the vLLM engine: it has to be started twice."""
VLLM_PACKAGES = ("vllm", "pyarrow", "safetensors")
VLLM_LOG = "vllm.log"


@dataclass(frozen=True)
class Size:
    """How much is measured: which models, how many requests in flight, tokens per request and rounds at most."""

    models: tuple[str, ...]
    in_flight: tuple[int, ...]
    max_tokens: int
    rounds: int


DTYPES = ("auto", "float32", "float16", "bfloat16")

FULL = Size(("llama-0.6b", "llama-8b"), (1, 8, 64, 256), 64, 3)
TINY = Size(("llama-tiny",), (1, 8), 6, 1)


def main(
    tiny: Annotated[bool, typer.Option("--tiny", help="A tiny model; without a GPU there is no other.")] = False,
    out: Annotated[str, typer.Option(help="Where to write; $OUT if it is set, else results/bench-gpu.")] = "",
    seconds: Annotated[float, typer.Option(help="All there is, from the start of the process.")] = 480.0,
    models: Annotated[str, typer.Option(help="Shapes: llama-0.6b, llama-8b, llama-tiny.")] = "",
    in_flight: Annotated[str, typer.Option(help="Requests at once, as 1,8,64.")] = "",
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}; auto is bfloat16 on a GPU that has it.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    write: Annotated[bool | None, typer.Option("--record/--no-record", help="Update RESULTS.md.")] = None,
) -> None:
    """Check the engine's rows on a GPU, and measure it."""
    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r} is none of {', '.join(DTYPES)}", param_hint="--dtype")
    if device not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter(f"{device!r} is none of auto, cpu, cuda", param_hint="--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no CUDA GPU here", param_hint="--device")
    cuda = device != "cpu" and torch.cuda.is_available()
    size = TINY if tiny or not cuda else FULL
    shapes = tuple(filter(None, models.split(","))) or size.models
    known = [name for name, shape in RANDOM_MODELS.items() if shape["model_type"] == "llama"]
    if unknown := set(shapes) - set(known):
        raise typer.BadParameter(f"{min(unknown)!r} is none of {', '.join(known)}", param_hint="--models")
    numbers = list(filter(None, in_flight.split(",")))
    if not all(number.isascii() and number.isdigit() and int(number) for number in numbers):
        raise typer.BadParameter(f"{in_flight!r} is not a list of numbers above 0, as 1,8,64", param_hint="--in-flight")
    size = replace(size, models=shapes, in_flight=tuple(map(int, numbers)) or size.in_flight)
    full = cuda and not tiny
    folder = Path(out or os.environ.get("OUT") or "results/bench-gpu")
    report = GpuReport(folder, RESULTS if (full if write is None else write) else None)
    began = time.monotonic() - (time.time() - psutil.Process().create_time())
    code = Bench(report, size, dtype, device, began, began + seconds - RESERVE_S).run()
    print((folder / SECTION).read_text())
    raise typer.Exit(code)


class Bench:
    """Runs the parts one after the other."""

    def __init__(self, report: GpuReport, size: Size, dtype: str, device: str, began: float, end: float) -> None:
        """Prepare; `began` and `end` are on the monotonic clock."""
        self._report = report
        self._size = size
        self._dtype = dtype
        self._device = device
        self._began = began
        self._end = end

    def run(self) -> int:
        """Run all parts; returns the exit code."""
        size = self._size
        self._part("environment", "", self._environment)
        for number, name in enumerate(size.models):
            self._part("rows", name, partial(self._rows, name))
            if number == 0:
                self.vllm(name)
        self._part("copies", "", self._copies)
        for number, name in enumerate(size.models):
            self._speeds(name, models_left=len(size.models) - number)
        bad = [part for part in self._report.parts if part.status in ("wrong", "failed")]
        checked = [part for part in self._report.parts if part.name.endswith("rows") and part.status == "ok"]
        for part in bad:
            self._stage(f"{part.title}: {part.status.upper()}")
            for problem in part.result.get("problems", [part.reason]):
                self._stage(f"  {problem}")
        if not checked and not bad:
            self._stage("no rows were checked")
        return 1 if bad or not checked else 0

    def _workload(self, name: str) -> Workload:
        dtype = self._dtype
        if dtype == "auto" and self._size.models == TINY.models:
            dtype = "float32"
        return Workload(random_weights=name, dtype=dtype, device=self._device)

    def _environment(self) -> dict[str, Any]:
        found: dict[str, Any] = {"machine": machine(), "python": sys.version.split()[0], "packages": installed()}
        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(0)
            found |= {
                "device": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "device_memory": properties.total_memory,
                "cuda": torch.version.cuda,
            }
        return found

    def _rows(self, name: str) -> dict[str, Any]:
        return asdict(check_rows(self._workload(name), self._end))

    def vllm(self, name: str) -> None:
        """Have the vLLM engine checked and measured in a process of its own, and add its parts as they end."""
        absent = [package for package in VLLM_PACKAGES if importlib.util.find_spec(package) is None]
        now = time.monotonic()
        if absent or now >= self._end:
            why = (
                f"{absent[0]} is not installed here; constraints-vllm-cuda.txt has vLLM"
                if absent
                else "the time was over"
            )
            self._add(Part("vllm", name, "not run", 0.0, {}, why))
            return
        workload = self._workload(name)
        device, dtype = workload.place()
        parts, end = self._report.folder / "vllm.jsonl", now + (self._end - now) * VLLM_SHARE
        parts.write_text("")
        task = {
            "model": name,
            "dtype": str(dtype).removeprefix("torch."),
            "device": device.type,
            "in_flight": self._size.in_flight or (8,),
            "max_tokens": self._size.max_tokens,
            "rounds": self._size.rounds if self._size.in_flight else 0,
            "seconds": end - now,
            "file": str(parts),
        }
        with (self._report.folder / VLLM_LOG).open("w") as log_file:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu_vllm", json.dumps(task)],
                stdout=log_file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                added = 0
                while process.poll() is None and time.monotonic() < end + RESERVE_S:
                    time.sleep(0.2)
                    added = self._take_in(parts, added)
                ended = process.poll()
            finally:
                # It and what it has started, all of which are in its session.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._take_in(parts, added)
        if ended != 0:
            why = "its time was over" if ended is None else f"its process ended with {ended}; see {VLLM_LOG}"
            self._add(Part("vllm", name, "not run" if ended is None else "failed", time.monotonic() - now, {}, why))

    def _take_in(self, parts: Path, added: int) -> int:
        """Add the parts that have been written since the first `added`; returns how many there are."""
        lines = [line for line in parts.read_text().splitlines(keepends=True) if line.endswith("\n")]
        for line in lines[added:]:
            self._add(Part(**json.loads(line)))
        return len(lines)

    def _copies(self) -> dict[str, Any]:
        device, _ = self._workload(self._size.models[0]).place()
        if device.type != "cuda":
            raise NotRunError("there is no GPU to copy from")
        return {"sizes": [asdict(copy) for copy in measure_copies(device)]}

    def _speeds(self, name: str, models_left: int) -> None:
        """Measure one model at every number in flight; each group may take its share of the time that is left."""
        loaded: list[LoadedModel] = []

        def load() -> dict[str, Any]:
            with fitting():
                loaded.append(self._workload(name).load())
            weights = sum(p.nbytes for p in loaded[0].observed._module.parameters())
            return {"weight_bytes": weights, "dtype": str(loaded[0].dtype).removeprefix("torch.")}

        load_part = self._part("load", name, load)
        for number, in_flight in enumerate(self._size.in_flight):
            groups_left = len(self._size.in_flight) * models_left - number

            def measure(in_flight: int = in_flight, groups_left: int = groups_left) -> dict[str, Any]:
                if not loaded:
                    raise NotRunError(f"the model was not loaded: {load_part.reason}")
                now = time.monotonic()
                share = (self._end - now) / groups_left
                group = measure_group(
                    loaded[0],
                    in_flight,
                    max_tokens=self._size.max_tokens,
                    rounds=self._size.rounds,
                    more_until=now + share,
                    deadline=min(self._end, now + 2 * share),
                    stage=self._stage,
                )
                return group_json(group)

            self._part("speed", f"{name}, {in_flight} in flight", measure)
        loaded.clear()
        release()

    def _part(self, name: str, of: str, run: Callable[[], dict[str, Any]]) -> Part:
        """Run one part, and write how it ended; whatever happens in it, the next one runs."""
        start = time.monotonic()
        result: dict[str, Any] = {}
        status: Status = "ok"
        reason = ""
        try:
            if start >= self._end:
                raise OutOfTimeError("the time was over")
            with fitting():
                result = run()
        except DidNotFitError as error:
            status, reason = "did not fit", str(error)
        except (OutOfTimeError, NotRunError) as error:
            status, reason = "not run", str(error)
        except Exception as error:
            log.exception("%s failed", name)
            status, reason = "failed", "".join(traceback.format_exception_only(error)).strip()
        if result.get("problems"):
            status, reason = "wrong", str(result["problems"][0])
        release()
        part = Part(name, of, status, time.monotonic() - start, result, reason)
        self._add(part)
        return part

    def _add(self, part: Part) -> None:
        self._report.add(part)
        self._stage(f"{part.title}: {part.status}{f', {part.reason}' if part.reason else ''}")

    def _stage(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:7.1f} s  {text}", file=sys.stderr, flush=True)


class NotRunError(Exception):
    """A part has nothing to run on; the message says what is missing."""


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    typer.run(main)
