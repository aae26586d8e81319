"""vLLM by itself, capturing nothing, as one of the ways to generate.

It lives in an environment of its own (`make bench-vllm` makes it), so a column of it is measured by that environment's Python.
The engine is driven step by step, so that a request is made when there is room for it, as for every other way.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from benchmarks.ways import Run, UnavailableError, Way, end_tokens
from benchmarks.workload import Workload
from serve_app.sources import locate

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
        config = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            shape = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if (Path(path) / GENERATION_CONFIG_NAME).exists():
            shape.generation_config = GenerationConfig.from_pretrained(path)
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
