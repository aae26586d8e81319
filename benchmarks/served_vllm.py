"""`roentgen serve` compared with `vllm serve`, its users' alternative: `python -m benchmarks.served_vllm`.

With `--engine transformers` this project's server uses the engine that runs everywhere. Three servers run at once, each in
its own process, and alternate on the same chats of one client: vLLM's with its defaults, vLLM's with all cores (by default
it leaves one of a CPU's cores to its other process), and this project's with no, some or full capture. Replies are not
streamed, as in an evaluation. Captured rows are on disk before the reply is sent. No two runs share a prefix. Requires the
environment of `make test-vllm`.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any
from uuid import uuid4

import httpx
import torch
import typer
from transformers import AutoConfig

import roentgen
from benchmarks.paired_statistics import median_interval
from benchmarks.pairs import interleave
from benchmarks.results_file import record, table
from benchmarks.serving import ask_all
from benchmarks.stage_printer import stage_printer
from benchmarks.workload import Workload, capture_request
from roentgen.contract import stored_key
from roentgen.defaults import EMBEDDED_MODEL
from roentgen.linear_probe import ProbeCard, SavedProbe, save_probes
from serve_app.models.model_source import locate

SECTIONS = {"vllm": "Served by vLLM", "transformers": "Served by transformers"}
DEFAULTS, EVERY_CORE = "vllm serve", "vllm serve, every core"
CACHE_TOKENS, CONTEXT = 32_768, 4096
CACHE_BYTES = 1 << 30
"""More than as many tokens of an embedded model take."""
READY_S = 600
N_PROBES, PROBED = 8, "probes"
NAMES = {
    "none": "nothing",
    "3x2": "3 layers × 2 hook points",
    "all": "every layer's residual",
    PROBED: f"nothing; scores of {N_PROBES} saved probes in the reply",
}
SETTLE_S = 1.0


def main(
    engine: Annotated[str, typer.Option(help="This project's: vllm, or transformers.")] = "vllm",
    model: Annotated[str, typer.Option(help=f"{EMBEDDED_MODEL}, a folder, or a hub id.")] = EMBEDDED_MODEL,
    problems: Annotated[str, typer.Option(help="A source of problems; GSM8K if it is at hand.")] = "",
    in_flight: Annotated[str, typer.Option(help="Requests at once.")] = "1,16,64",
    max_tokens: Annotated[int, typer.Option(help="The most to generate per prompt.")] = 32,
    rounds: Annotated[int, typer.Option(help="Of interleaved runs, per number in flight.")] = 5,
    folder: Annotated[Path, typer.Option(help="Rates are kept here, by number in flight.")] = Path("results"),
    write: Annotated[bool, typer.Option("--record/--no-record", help="Update RESULTS.md.")] = True,
) -> None:
    """Measure this project's server against vLLM's."""
    if engine not in SECTIONS:
        raise typer.BadParameter(f"{engine!r} is unknown; there are {', '.join(SECTIONS)}", param_hint="--engine")
    file = folder / f"served_{engine}.json"
    workload, stage = Workload(model, problems=problems, max_tokens=max_tokens), stage_printer()
    numbers = tuple(map(int, in_flight.split(",")))
    with TemporaryDirectory() as temporary, ExitStack() as stack:
        commands = {DEFAULTS: _vllm(workload, max(numbers)), EVERY_CORE: _vllm(workload, max(numbers))}
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        environments = {EVERY_CORE: {"VLLM_CPU_OMP_THREADS_BIND": cores}}
        probes = _save_probes(workload, Path(temporary) / "probes")
        commands["roentgen"] = _roentgen(engine, workload, max(numbers), Path(temporary))
        urls: dict[str, str] = {}
        for name, command in commands.items():
            urls[name] = stack.enter_context(
                _server(command, environments.get(name, {}), Path(temporary) / f"{name}.log")
            )
            stage(f"{name} is ready")
        for number in numbers:
            rates = json.loads(file.read_text()) if file.exists() else {}
            rates[str(number)] = _rates(workload, urls, probes, number, rounds, stage)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(rates))
    body = report(engine, workload, json.loads(file.read_text()))
    print(body)
    if write:
        record(SECTIONS[engine], body)


def _vllm(workload: Workload, most: int) -> list[str]:
    return [
        # What `vllm serve` runs; the command itself needs a package of that very name, and the CPU build has another.
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", locate(workload.model).path),
        *("--served-model-name", workload.model, "--max-num-seqs", str(most), "--max-model-len", str(CONTEXT)),
        *("--kv-cache-memory-bytes", str(CACHE_BYTES), "--disable-uvicorn-access-log"),
    ]


def _roentgen(engine: str, workload: Workload, most: int, folder: Path) -> list[str]:
    return [
        *(str(Path(sys.executable).with_name("roentgen")), "serve", "--model", workload.model, "--engine", engine),
        *(["--compile-first"] if engine == "transformers" else []),
        *("--max-batch", str(most), "--max-cache-tokens", str(CACHE_TOKENS)),
        *("--store", str(folder / "store"), "--probes", str(folder / "probes")),
    ]


def _save_probes(workload: Workload, folder: Path) -> list[str]:
    """Save probes of as many layers' residual streams, from the first to the last; returns what requests call them."""
    config = AutoConfig.from_pretrained(locate(workload.model).path)
    width, last = config.hidden_size, config.num_hidden_layers - 1
    generator, source = torch.Generator().manual_seed(0), locate(workload.model)
    found = []
    for number in range(N_PROBES):
        card = ProbeCard(
            model=source.name,
            revision=source.revision,
            key=stored_key("resid_post", round(number * last / (N_PROBES - 1))),
            positions="all",
            kind="linear",
            label="random",
            target="binary",
            strength=0,
            folds=0,
            metrics={},
            data_hash="",
            seed=0,
            roentgen=roentgen.__version__,
        )
        weight = torch.randn(1, width, generator=generator)
        found.append(SavedProbe(weight, torch.zeros(1), torch.zeros(width), torch.ones(width), card))
    save_probes(folder / "random", found)
    return [f"random/{probe.card.name}" for probe in found]


@contextmanager
def _server(command: list[str], environment: dict[str, str], log: Path) -> Iterator[str]:
    """Run a server; yields its base URL once it is ready.

    Raises:
        RuntimeError: if it ends, or is not ready after `READY_S`; with what it has said last.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    listening = ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as said:
        server = subprocess.Popen(
            [*command, *listening], stdout=said, stderr=said, env={**os.environ, **environment}, start_new_session=True
        )
    try:
        end = time.monotonic() + READY_S
        while not _healthy(f"http://127.0.0.1:{port}/health"):
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{command[0]} is not ready: {log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait()


def _healthy(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def _rates(
    workload: Workload,
    urls: dict[str, str],
    probes: list[str],
    in_flight: int,
    rounds: int,
    stage: Callable[[str], None],
) -> dict[str, list[float]]:
    """Return tokens per second by round, of vLLM's servers and of every capture."""
    chats = workload.messages(max(2 * in_flight, 6))
    layers = AutoConfig.from_pretrained(locate(workload.model).path).num_hidden_layers

    def run(name: str, capture: str, most: int, messages: list[Any]) -> float:
        asked = None if capture == PROBED else capture_request(layers, capture)
        body: dict[str, Any] = {"cache_salt": uuid4().hex, "ignore_eos": True}
        if capture == PROBED:
            body["probes"] = probes
        if asked is not None:
            body["activations"] = asked.model_dump(mode="json", exclude_none=True, by_alias=True)
        time.sleep(SETTLE_S)
        rate = asyncio.run(ask_all(urls[name], workload.model, messages, body, most, in_flight))
        stage(f"{in_flight} in flight, {name}, {capture}: {rate:.1f} tokens/s")
        return rate

    arms: dict[str, Callable[[], float]] = {}
    for name in (DEFAULTS, EVERY_CORE):
        run(name, "none", 4, chats[:in_flight])
        arms[name] = lambda name=name: run(name, "none", workload.max_tokens, chats)  # type: ignore[misc]
    for capture in NAMES:
        run("roentgen", capture, 4, chats[:in_flight])
        arms[capture] = lambda capture=capture: run("roentgen", capture, workload.max_tokens, chats)  # type: ignore[misc]
    return interleave(arms, rounds)


def report(engine: str, workload: Workload, rates: dict[str, dict[str, list[float]]]) -> str:
    """Lay out what has been measured in Markdown."""
    from vllm import __version__ as vllm_version

    rows = []
    for in_flight, found in sorted(rates.items(), key=lambda item: int(item[0])):
        for capture in NAMES:
            ratios = [
                str(median_interval([a / b for a, b in zip(found[capture], found[plain], strict=True)]))
                for plain in (DEFAULTS, EVERY_CORE)
            ]
            rows.append([in_flight, NAMES[capture], *ratios, str(len(found[capture]))])
    return "\n\n".join(
        [
            f"{workload.name}, GSM8K prompts without examples, {workload.max_tokens} tokens each, greedy, chat completions "
            f"over HTTP, not streamed: `roentgen serve --engine {engine}` against `vllm serve` {vllm_version}, with "
            "its defaults and with every core to compute on. What is captured is on the disk before the reply comes. Median "
            "ratio of tokens/s of the same round, and its interval:",
            table(["in flight", "captured", f"against `{DEFAULTS}`", f"against `{EVERY_CORE}`", "rounds"], rows),
        ]
    )


if __name__ == "__main__":
    typer.run(main)
