"""Runs one way to generate at one concurrency in its own process, to measure its own peak memory.

It reads its parameters as JSON from its only argument and prints the results as a line of JSON.
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median

import torch
from transformers import PreTrainedModel

from benchmarks.limits import WeightBytes
from benchmarks.paired_statistics import percentile
from benchmarks.vllm_way import PYTHON, loaded_capturing_vllm, loaded_vllm
from benchmarks.ways import UnavailableError, Way, continuous_way, end_tokens, engine_way, generate_way, seed_way
from benchmarks.workload import Workload
from serve_app.engines.transformers.engine import TransformersEngine

WAYS = {
    "seed": "3x2",
    "generate": "none",
    "continuous": "none",
    "engine": "none",
    "engine-3x2": "3x2",
    "engine-all": "all",
    "vllm": "none",
    "vllm-3x2": "3x2",
    "vllm-all": "all",
}
"""The ways and their captures."""


@dataclass(frozen=True)
class Column:
    """The results of one way."""

    way: str
    """Its name."""
    in_flight: int
    """Requests at once."""
    prompts: int = 0
    """How many there were."""
    prompt_tokens: int = 0
    """Tokens of the prompts."""
    tokens: int = 0
    """Generated."""
    seconds: float = 0.0
    """How long it took."""
    first_token_s: float = 0.0
    """Median time to a first token."""
    first_token_p95_s: float = 0.0
    """Its 95th percentile."""
    peak_bytes: int = 0
    """The process's memory at its largest (on a GPU, the tensors on it)."""
    weights: WeightBytes | None = None
    """Of the model."""
    skipped: str = ""
    """Why it could not run; everything else is then 0."""

    @property
    def rate(self) -> float:
        """Tokens generated per second."""
        return self.tokens / self.seconds if self.seconds else 0.0


def measure_column(way: str, in_flight: int, prompts: int, workload: Workload) -> Column:
    """Measure one column in a process of its own."""
    task = {"way": way, "in_flight": in_flight, "prompts": prompts, "workload": asdict(workload)}
    python = str(PYTHON) if way.startswith("vllm") and PYTHON.exists() else sys.executable
    child = subprocess.run(
        [python, "-m", "benchmarks.column", json.dumps(task)],
        capture_output=True,
        text=True,
    )
    lines = child.stdout.strip().splitlines()
    if child.returncode or not lines:
        said = [line for line in child.stderr.splitlines() if line.strip()]
        return Column(way, in_flight, skipped=said[-1] if said else f"it ended with {child.returncode}")
    found = json.loads(lines[-1])
    weights = found.pop("weights")
    return Column(**found, weights=WeightBytes(**weights) if weights else None)


def run_column(way: str, in_flight: int, prompts: int, workload: Workload) -> Column:
    """Measure one column in this process: a short run to warm up, then all prompts."""
    try:
        with loaded_way(way, workload, in_flight) as (run, module):
            tokenizer = workload.tokenizer()
            texts = workload.prompts(tokenizer, prompts)
            run(texts[:1], 2, 1)
            found = run(texts, workload.max_tokens, in_flight)
            weights = WeightBytes.of(module)
    except UnavailableError as error:
        return Column(way, in_flight, skipped=str(error))
    return Column(
        way=way,
        in_flight=in_flight,
        prompts=prompts,
        prompt_tokens=found.prompt_tokens,
        tokens=found.tokens,
        seconds=found.seconds,
        first_token_s=median(found.first_token_s),
        first_token_p95_s=percentile(found.first_token_s, 95),
        peak_bytes=peak_bytes(),
        weights=weights,
    )


@contextmanager
def loaded_way(name: str, workload: Workload, in_flight: int) -> Iterator[tuple[Way, PreTrainedModel]]:
    """Load the model and yield a way to generate with it, and the bare model.

    Args:
        name: one of `WAYS`.
        workload: what to load.
        in_flight: the most requests that will be in flight.
    """
    if name.startswith("engine"):
        model = workload.load()
        engine = TransformersEngine(model, max_batch=in_flight, max_queue=1024, prefix_cache=False)
        try:
            yield engine_way(engine, model, WAYS[name]), model.observed._module
        finally:
            engine.close()
        return
    if name.startswith("vllm"):
        capture = WAYS[name]
        with (
            loaded_vllm(workload, in_flight)
            if capture == "none"
            else loaded_capturing_vllm(workload, in_flight, capture) as loaded
        ):
            yield loaded
        return
    module, tokenizer = workload.load_plain()
    end = end_tokens(module, tokenizer)
    if name == "seed":
        yield seed_way(module, tokenizer), module
    else:
        yield (generate_way if name == "generate" else continuous_way)(module, end), module


def peak_bytes() -> int:
    """Return this process's memory at its largest; on a GPU, that of the tensors on it."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    column = run_column(task["way"], task["in_flight"], task["prompts"], Workload(**task["workload"]))
    print(json.dumps(asdict(column)), flush=True)
    # A way that failed may have left threads that nothing can join.
    os._exit(0)
