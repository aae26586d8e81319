"""Plain vLLM, and this project's engine on vLLM, as ways to generate.

They require a separate environment (created by `make bench-vllm`), so a column is measured by that environment's Python.
For its own column, plain vLLM is driven step by step, so that a request is created when there is room for it, as for every
other way. When compared with this project's engine it is configured as by `vllm serve`, with vLLM's defaults: compiled,
with chunked prefill and a prefix cache, in a process that is idle while the other computes.
"""

import asyncio
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME
from ulid import ULID

from benchmarks.ways import Keep, MeasuredRun, OutOfTimeError, UnavailableError, Way, end_tokens, engine_way
from benchmarks.workload import Workload
from roentgen.contract import ActivationRequest, stored_key
from roentgen.linear_probe import LinearProbe
from roentgen.tokenized_text import TokenizedText
from serve_app.capture.probe_scores import RequestProbe
from serve_app.engines.protocol import Finished
from serve_app.engines.rollout_metadata import make_metadata
from serve_app.engines.served_model import ServedModel
from serve_app.engines.storage import StoredActivations
from serve_app.engines.vllm.loading import VllmModel, VllmSettings, engine_arguments, start
from serve_app.engines.vllm.requirements import EngineUnavailableError
from serve_app.models.model_source import locate

if TYPE_CHECKING:
    from serve_app.engines.vllm.engine import EngineLoop, VllmEngine

PYTHON = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"
CACHE_BYTES = 4 << 30
"""Of the KV cache on a CPU; on a GPU it takes what is free."""
CONTEXT = 4096

TAPS = ("resid_post", "ln_attn", "ln_mlp")
"""Those of a server that nobody told which."""
MOST_TAPS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "ln_attn", "ln_mlp")
"""Every hook point of the layers."""
N_PROBES = 8


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

    def run(prompts: list[list[int]], max_tokens: int, in_flight: int) -> MeasuredRun:
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
        return MeasuredRun(sum(map(len, prompts)), tokens, seconds, [first[name] - made[name] for name in made])

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
    with TemporaryDirectory() as folder:
        name = workload.saved(Path(folder)).model
        with capturing_engine(name, settings(workload, in_flight, Path(folder))) as (model, engine):
            yield engine_way(engine, model, capture, keeper(model, engine)), _shape(model.source.path, model.dtype)[0]


@contextmanager
def capturing_engine(name: str, given: VllmSettings) -> "Iterator[tuple[VllmModel, VllmEngine]]":
    """Start this project's vLLM engine.

    Args:
        name: of a model that a server can load.
        given: how.

    Raises:
        UnavailableError: if vLLM is not installed.
    """
    try:
        model, engine = start(locate(name), given)
    except EngineUnavailableError as error:
        raise UnavailableError(str(error)) from error
    try:
        yield model, engine
    finally:
        engine.close()


def settings(
    workload: Workload,
    in_flight: int,
    folder: Path,
    cache_tokens: int = 0,
    threads: int = 0,
    taps: tuple[str, ...] = TAPS,
) -> VllmSettings:
    """Return the settings under which this project's engine is measured; what it captures is stored in the folder."""
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
        taps=taps,
        store=str(folder / "store"),
    )


@contextmanager
def plain_engine(name: str, given: VllmSettings, **others: Any) -> "Iterator[EngineLoop]":
    """Start vLLM as `vllm serve` does, with room for as many requests and tokens as one of this project's engines.

    Args:
        name: of the model.
        given: the other engine's settings.
        others: of vLLM's arguments.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from serve_app.engines.vllm.engine import EngineLoop

    place = torch.device(given.device)
    path = locate(name).path
    ours = engine_arguments(AutoConfig.from_pretrained(path), given, place, getattr(torch, given.dtype))
    same = ("dtype", "max_model_len", "max_num_seqs", "kv_cache_memory_bytes")
    arguments = {name: ours[name] for name in same if name in ours} | others
    if place.type == "cpu":
        from serve_app.engines.vllm.cpu_worker import prepare_cpu

        prepare_cpu(given.threads, ranks=1)  # one process for core and worker, which leaves no core idle
    loop = EngineLoop(lambda: AsyncLLM.from_engine_args(AsyncEngineArgs(model=path, **arguments)))
    try:
        yield loop
    finally:
        loop.client.shutdown()
        loop.stop()


def plain_way(loop: "EngineLoop", deadline: float = math.inf) -> Way:
    """Return plain vLLM through its own client, as its server drives it; its prefix cache is empty when a run begins.

    Args:
        loop: where it runs.
        deadline: on the monotonic clock: a run that has not ended by then raises an `OutOfTimeError`.
    """
    from vllm import SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    client: Any = loop.client

    def run(prompts: list[list[int]], max_tokens: int, in_flight: int) -> MeasuredRun:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, output_kind=RequestOutputKind.DELTA)

        async def generate() -> MeasuredRun:
            await client.reset_prefix_cache()  # prompts of another run would be found in it
            gate = asyncio.Semaphore(in_flight)
            start = time.perf_counter()

            async def one(number: int) -> tuple[float, float, int, int]:
                async with gate:
                    made, first, last, tokens, cached = time.perf_counter(), 0.0, 0.0, 0, 0
                    prompt = TokensPrompt(prompt_token_ids=prompts[number])
                    async for output in client.generate(prompt, params, f"{start}-{number}"):
                        last = time.perf_counter()
                        first = first or last
                        tokens += len(output.outputs[0].token_ids)
                        cached = output.num_cached_tokens or 0
                    return first - made, (last - first) / max(tokens - 1, 1), tokens, cached

            found = await asyncio.gather(*map(one, range(len(prompts))))
            first, between, tokens, cached = zip(*found, strict=True)
            seconds = time.perf_counter() - start
            return MeasuredRun(sum(map(len, prompts)), sum(tokens), seconds, list(first), sum(cached), list(between))

        left = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
        try:
            found: MeasuredRun = loop.run(lambda: asyncio.wait_for(generate(), left))
            return found
        except TimeoutError:
            raise OutOfTimeError("the time was over") from None

    return run


def probes(model: ServedModel, count: int = N_PROBES) -> tuple[RequestProbe, ...]:
    """Return probes of as many layers' residual streams, from the first to the last, as a server makes them of a request's."""
    structure, generator = model.structure, torch.Generator().manual_seed(0)
    width, last = structure.d_model, structure.num_layers - 1
    found = []
    for number in range(count):
        key = stored_key("resid_post", round(number * last / (count - 1)))
        weight, bias = torch.randn(1, width, generator=generator), torch.zeros(1)
        linear_probe = LinearProbe(weight, bias, torch.zeros(width), torch.ones(width)).to(model.device)
        found.append(RequestProbe(f"probe {number}", key, structure.taps[key], linear_probe, ""))
    return tuple(found)


def keeper(model: ServedModel, engine: "VllmEngine") -> Keep:
    """Return what has the engine's worker store a completion."""

    def keep(prompt: list[int], finished: Finished) -> "Future[StoredActivations]":
        said = TokenizedText("", prompt, [0] * len(prompt), [], len(prompt))
        entry = make_metadata(model, said, "completion", ActivationRequest(), finished, "measured", str(ULID()))
        return engine.storage.keep(entry, finished)

    return keep
