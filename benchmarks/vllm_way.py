"""vLLM by itself, capturing nothing, and with this project's capture, as ways to generate.

It lives in an environment of its own (`make bench-vllm` makes it), so a column of it is measured by that environment's Python.
The engine is driven step by step, so that a request is made when there is room for it, as for every other way.
"""

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME
from ulid import ULID

from benchmarks.ways import Keep, Run, UnavailableError, Way, end_tokens, engine_way
from benchmarks.workload import Workload
from roentgen.contract import ActivationRequest
from roentgen.tokenized_text import TokenizedText
from serve_app.engines.protocol import Finished
from serve_app.engines.rollout import make_entry
from serve_app.engines.served_model import ServedModel
from serve_app.engines.storage import Stored
from serve_app.engines.vllm.loading import VllmModel, VllmSettings, start
from serve_app.engines.vllm.requirements import EngineUnavailableError
from serve_app.models.sources import locate

if TYPE_CHECKING:
    from serve_app.engines.vllm.engine import VllmEngine

PYTHON = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"
CACHE_BYTES = 4 << 30
"""Of the KV cache on a CPU; on a GPU it takes what is free."""
CONTEXT = 4096


@contextmanager
def loaded_vllm(workload: Workload, in_flight: int) -> Iterator[tuple[Way, PreTrainedModel]]:
    """Load the model into vLLM and yield the way to generate with it, and the model's shape without weights.

    Raises:
        UnavailableError: if vLLM is not installed.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that the memory measured is its own
    try:
        from vllm import EngineArgs, LLMEngine, SamplingParams, TokensPrompt
    except ImportError as error:
        raise UnavailableError(
            f"vLLM is not installed here; `make bench-vllm` installs its CPU build ({error})"
        ) from error
    device, dtype = workload.place()
    with TemporaryDirectory() as folder:
        saved = workload.saved(Path(folder))
        path = saved.model if saved is not workload else locate(workload.model).path
        shape, config = _shape(path, dtype)
        end = sorted(end_tokens(shape, workload.tokenizer()))
        engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=path,
                dtype=str(dtype).removeprefix("torch."),
                max_model_len=min(CONTEXT, config.max_position_embeddings),
                max_num_seqs=in_flight,
                enable_prefix_caching=False,  # nobody else has one, and problems are posed once
                kv_cache_memory_bytes=CACHE_BYTES if device.type == "cpu" else None,
                skip_tokenizer_init=True,
            )
        )

    def run(prompts: list[list[int]], max_tokens: int, in_flight: int) -> Run:
        sampling = SamplingParams(
            temperature=0, max_tokens=max_tokens, stop_token_ids=end, ignore_eos=True, detokenize=False
        )
        made: dict[str, float] = {}
        first: dict[str, float] = {}
        waiting = list(enumerate(prompts))[::-1]
        start = time.perf_counter()
        tokens = 0

        def submit() -> None:
            number, prompt = waiting.pop()
            name = f"{start}-{number}"
            made[name] = time.perf_counter()
            engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), sampling)

        for _ in range(min(in_flight, len(prompts))):
            submit()
        while engine.has_unfinished_requests():
            for output in engine.step():
                first.setdefault(output.request_id, time.perf_counter())
                if output.finished:
                    tokens += len(output.outputs[0].token_ids)
                    if waiting:
                        submit()
        seconds = time.perf_counter() - start
        return Run(sum(map(len, prompts)), tokens, seconds, [first[name] - made[name] for name in made])

    yield run, shape


def _shape(path: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PretrainedConfig]:
    """Return a model without weights, and its configuration."""
    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if (Path(path) / GENERATION_CONFIG_NAME).exists():
        shape.generation_config = GenerationConfig.from_pretrained(path)
    return shape, config


@contextmanager
def loaded_capturing_vllm(workload: Workload, in_flight: int, capture: str) -> Iterator[tuple[Way, PreTrainedModel]]:
    """Load the model into the vLLM engine and yield the way to generate and capture with it, and the model's shape.

    Raises:
        UnavailableError: if vLLM is not installed.
    """
    with TemporaryDirectory() as folder, capturing_engine(workload, in_flight, Path(folder)) as (model, engine):
        yield engine_way(engine, model, capture, keeper(model, engine)), _shape(model.source.path, model.dtype)[0]


@contextmanager
def capturing_engine(
    workload: Workload, in_flight: int, folder: Path, *, cache_tokens: int = 0, threads: int = 0
) -> "Iterator[tuple[VllmModel, VllmEngine]]":
    """Start this project's vLLM engine; what it captures is stored in the folder.

    Raises:
        UnavailableError: if vLLM is not installed.
    """
    saved = workload.saved(folder)
    try:
        model, engine = start(locate(saved.model), settings(workload, in_flight, folder, cache_tokens, threads))
    except EngineUnavailableError as error:
        raise UnavailableError(str(error)) from error
    try:
        yield model, engine
    finally:
        engine.close()


def settings(workload: Workload, in_flight: int, folder: Path, cache_tokens: int = 0, threads: int = 0) -> VllmSettings:
    """Return the settings under which vLLM is measured."""
    device, dtype = workload.place()
    return VllmSettings(
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
        max_batch=in_flight,
        max_queue=1024,
        max_cache_tokens=cache_tokens,
        tensor_parallel_size=1,
        threads=threads,
        capture=True,
        taps=(),
        eager=True,
        store=str(folder / "store"),
    )


def keeper(model: ServedModel, engine: "VllmEngine") -> Keep:
    """Return what has the engine's worker store a completion."""

    def keep(prompt: list[int], finished: Finished) -> "Future[Stored]":
        said = TokenizedText("", prompt, [0] * len(prompt), [], len(prompt))
        entry = make_entry(model, said, "completion", ActivationRequest(), finished, "measured", str(ULID()))
        return engine.storage.keep(entry, finished)

    return keep
