"""Starts vLLM with a model, and finds out which hook points it can capture.

The model is compiled, with CUDA graphs, and has taps in its graph (`graph_taps`) at the hook points that the server's
configuration declares. An eager server instead runs it module by module through nnsight's integration, and requests may name
any module. A server that does not capture is plain vLLM.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, PretrainedConfig

from roentgen.contract import LAYER_HOOK_POINTS, MODEL_HOOK_POINTS
from serve_app.capture.resolver import ResolutionError, number_of_experts
from serve_app.capture.structure import ModelStructure, Tap
from serve_app.engines.batching import LoadReport
from serve_app.engines.memory_budget import CPU_SHARE, free_host_memory
from serve_app.engines.protocol import SWITCHED_OFF, PrefixCaching
from serve_app.engines.served_model import ServedModel, native_dtype
from serve_app.engines.vllm.hook_points import (
    Modules,
    Verified,
    candidates,
    declared_taps,
    missing,
    split_locations,
)
from serve_app.engines.vllm.lifetime import export_replica_pid
from serve_app.engines.vllm.neutrality import check_batching
from serve_app.engines.vllm.requirements import check_available
from serve_app.engines.vllm.worker_messages import TAPS_KEY, unpack
from serve_app.models.architecture import check_config, read_config
from serve_app.models.context import context_length
from serve_app.models.description import read_tokenizer
from serve_app.models.model_source import ModelSource
from serve_app.models.weights import compare_headers

if TYPE_CHECKING:
    from serve_app.engines.vllm.engine import Client, EngineLoop, VllmEngine

log = logging.getLogger(__name__)

VERIFIED_ON = "weights, as vLLM runs them"
UNTAPPED = (
    "this server has no tap there; start it with --taps default and that hook point, separated by a comma, or with --eager, "
    "which reads any module and is slower"
)
NO_CAPTURE = "this server does not capture (capture: false in its configuration)"

CPU_BLOCK_SIZE = 32
"""Tokens per block of the KV cache on a CPU. vLLM's default there is 128; its kernels take any multiple of 32. A prefix is
found up to its last whole block."""
ASSUMED_CONTEXT = 2048
"""Context length that vLLM itself assumes if a configuration has none."""

VERIFICATION_TOKENS = 8
"""Number of tokens of the request that hook points are verified on."""

TAP_ERROR = {torch.float32: 1e-3}
"""Largest relative error of a tap's median row against hooks; in half precision, kernels differ by more (`HALF_TAP_ERROR`)."""

HALF_TAP_ERROR = 0.1
"""The same in half precision; the error of rows of another token or step is about 1."""


@dataclass(frozen=True)
class VllmSettings:
    """Settings for starting vLLM."""

    dtype: str
    """"auto", or the name of a torch dtype."""
    device: str
    """"auto", "cpu" or "cuda"."""
    max_batch: int
    """Requests that run together."""
    max_queue: int
    """Requests that may wait."""
    max_cache_tokens: int
    """Size of the KV cache; 0 for what the memory allows."""
    tensor_parallel_size: int
    """Number of GPUs to split the model over."""
    threads: int
    """Number of threads on a CPU; 0 for one per core."""
    capture: bool
    """Whether requests may capture and steer."""
    taps: tuple[str, ...]
    """Hook points to tap in the model's graph."""
    store: str
    """Location of the activation store."""
    eager: bool = False
    """Whether a server that captures runs the model module by module, without taps."""
    batch_invariant: bool = False
    """Whether a request's tokens must not depend on other requests."""
    prefix_cache: bool = True
    """Whether to reuse the common prefix of prompts, if the kind of server allows it."""
    max_prefill_tokens: int = 0
    """Most tokens of one step; 0 for vLLM's default. An eager server reads prompts whole."""

    @property
    def prefix_caching(self) -> PrefixCaching:
        """Whether vLLM's prefix cache is enabled."""
        if not self.prefix_cache:
            return PrefixCaching(False, SWITCHED_OFF)
        if self.capture and self.eager:
            return PrefixCaching(False, "with --eager, nnsight has no rows of tokens that are found in vLLM's cache")
        if self.capture and self.batch_invariant:
            return PrefixCaching(False, "with --batch-invariant, every request computes its own rows")
        return PrefixCaching(True)

    @property
    def tapped(self) -> bool:
        """Whether the model has taps in its graph."""
        return self.capture and not self.eager


@dataclass(frozen=True)
class VllmModel(ServedModel):
    """A model that vLLM's workers hold; its weights are not in this process."""

    read_config: PretrainedConfig
    read_generation_config: GenerationConfig

    @property
    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        return self.read_config

    @property
    def generation_config(self) -> GenerationConfig:
        """The model's generation configuration."""
        return self.read_generation_config


def start(
    source: ModelSource,
    settings: VllmSettings,
    stage: Callable[[str], None] = log.info,
    *,
    trust_remote_code: bool = False,
) -> "tuple[VllmModel, VllmEngine]":
    """Load a model into vLLM, verify its hook points on a request, and return it with its engine.

    Args:
        source: what to load.
        settings: how to start vLLM.
        stage: called with each stage of loading, for `/health`.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        EngineUnavailableError: if vLLM is not installed, or not for this device, or the model is an adapter.
        ConfigError: if the model's configuration cannot be read.
        WeightsError: if a folder's weights are not those of the model that its configuration describes.
        ResolutionError: if the model's layers cannot be found, or it is not a causal decoder.
    """
    check_available(source, device=settings.device, batch_invariant=settings.batch_invariant)
    from serve_app.engines.vllm.engine import EngineLoop, VllmEngine

    place = torch.device("cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu")
    kind = native_dtype(place) if settings.dtype == "auto" else getattr(torch, settings.dtype)
    revision = source.commit
    config = read_config(source, trust_remote_code=trust_remote_code)
    check_config(config, trust_remote_code=trust_remote_code)
    compare_headers(source.path, source.name, config)
    arguments = engine_arguments(config, settings, place, kind)
    arguments |= {"revision": revision, "trust_remote_code": trust_remote_code}
    stage(f"loading {source.name} into vLLM ({kind}, {place})")
    loop = EngineLoop(lambda: _client(source.path, arguments, settings, place))
    try:
        structure = _structure(loop, source.name, config, settings, kind, stage)
        try:
            generation = GenerationConfig.from_pretrained(source.path, revision=revision)
        except OSError:
            generation = GenerationConfig.from_model_config(config)
        tokenizer = read_tokenizer(source, trust_remote_code=trust_remote_code)
        model = VllmModel(source, tokenizer, structure, place, kind, config, generation)
        stage("checking batching")
        begun = time.monotonic()
        context = arguments["max_model_len"]
        batching = loop.run(lambda: check_batching(loop.client, model.vocab_size, context, kind))
        if batching.reason:
            log.warning("requests run %s: %s", batching.kind, batching.reason)
        checks = LoadReport(batching, attention="vLLM's", compared_on=("the model",), seconds=time.monotonic() - begun)
        model = replace(model, checks=checks)
        if settings.capture:
            loop.run(lambda: loop.client.collective_rpc("roentgen_open", args=(settings.store,)))
    except BaseException:
        loop.client.shutdown()
        loop.stop()
        raise
    return model, VllmEngine(
        loop,
        model,
        max_model_len=arguments["max_model_len"],
        captures=settings.capture,
        max_batch=settings.max_batch,
        max_queue=settings.max_queue,
        batch_invariant=settings.batch_invariant,
        prefix_cache=_actual_prefix_caching(loop.client, settings.prefix_caching),
    )


def _actual_prefix_caching(client: "Client", wanted: PrefixCaching) -> PrefixCaching:
    """Return whether vLLM has enabled its prefix cache for this model."""
    if wanted.enabled and not client.vllm_config.cache_config.enable_prefix_caching:
        return PrefixCaching(False, "vLLM does not support it for this model")
    return wanted


def engine_arguments(
    config: PretrainedConfig, settings: VllmSettings, place: torch.device, kind: torch.dtype
) -> dict[str, Any]:
    """Return vLLM's engine arguments for a model.

    Args:
        config: the model's configuration.
        settings: the server's settings.
        place: device that it computes on.
        kind: dtype that it computes in.
    """
    context = context_length(config) or ASSUMED_CONTEXT
    found: dict[str, Any] = {
        "dtype": str(kind).removeprefix("torch."),
        "max_model_len": min(context, settings.max_cache_tokens or context),
        "max_num_seqs": settings.max_batch,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "enable_prefix_caching": None
        if settings.prefix_caching.enabled
        else False,  # None: if vLLM has it for the model
        "enable_chunked_prefill": settings.tapped or not settings.capture,
        "structured_outputs_config": {"backend": "guidance"},
        # Set explicitly, because vLLM would use Ray's inside one of Ray's placement groups.
        "distributed_executor_backend": "mp" if settings.tensor_parallel_size > 1 else "uni",
    }
    if settings.max_prefill_tokens and found["enable_chunked_prefill"]:
        found["max_num_batched_tokens"] = max(settings.max_prefill_tokens, settings.max_batch)
    if place.type == "cpu" and settings.prefix_caching.enabled:
        found["block_size"] = CPU_BLOCK_SIZE
    per_token = cache_bytes_per_token(config, kind, settings.tensor_parallel_size)
    if settings.max_cache_tokens:
        found["kv_cache_memory_bytes"] = _whole_blocks(settings.max_cache_tokens) * per_token
    elif place.type == "cpu":
        most = int(free_host_memory() * CPU_SHARE)
        found["kv_cache_memory_bytes"] = min(most, settings.max_batch * _whole_blocks(context) * per_token)
    return found


def cache_bytes_per_token(config: PretrainedConfig, kind: torch.dtype, ranks: int) -> int:
    """Return the bytes of a token in the KV cache of each rank, over all layers."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * max(heads // ranks, 1) * width * kind.itemsize)


def _whole_blocks(tokens: int, block: int = 128) -> int:
    return -(-tokens // block) * block + block  # vLLM reserves a block


def _client(path: str, arguments: dict[str, Any], settings: VllmSettings, place: torch.device) -> "Client":
    """Start vLLM's processes."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # vLLM would send usage statistics
    if settings.batch_invariant:
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    export_replica_pid()
    kind = "Graph" if settings.tapped else "Eager" if settings.capture else "Plain"
    worker = f"serve_app.engines.vllm.worker.{kind}Worker"
    if place.type == "cpu":
        from serve_app.engines.vllm.cpu_worker import prepare_cpu

        prepare_cpu(settings.threads, settings.tensor_parallel_size)
        worker = f"serve_app.engines.vllm.cpu_worker.Cpu{kind}Worker"
    if kind == "Eager":
        from nnsight.modeling.vllm import VLLM

        class Observed(VLLM):
            """nnsight's vLLM, with workers that observe whole batches."""

            _WORKER_CLS = worker

        observed: Client = Observed(path, mode="async", dispatch=True, **arguments).vllm_entrypoint
        return observed
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    if settings.tapped:
        arguments = {**arguments, "additional_config": {TAPS_KEY: settings.taps}}
    engine = AsyncEngineArgs(model=path, worker_cls=worker, **arguments)
    # Settings that are not given here, such as the tokens of a step, are chosen as for vLLM's own server.
    client: Client = AsyncLLM.from_engine_args(engine, usage_context=UsageContext.OPENAI_API_SERVER)
    return client


def all_locations(modules: Modules) -> frozenset[str]:
    """Return all locations of a model, each a module's path and a side."""
    return frozenset(f"{path}.{side}" for path in modules.paths for side in ("input", "output"))


def _structure(
    loop: "EngineLoop",
    name: str,
    config: PretrainedConfig,
    settings: VllmSettings,
    kind: torch.dtype,
    stage: Callable[[str], None],
) -> ModelStructure:
    """Find and verify the hook points of the model that the workers have loaded."""
    if not settings.capture:
        return _structure_without_capture(name, config)
    stage("verifying hook points")
    modules = unpack(loop.run(lambda: loop.client.collective_rpc("roentgen_modules"))[0], object)
    if not isinstance(modules, Modules):
        raise ResolutionError(str(modules))
    taps = _declared(settings.taps, modules) if settings.tapped else None
    read = all_locations(modules) if taps is None else frozenset(f"{tap.module}.{tap.side}" for tap in taps.values())
    text = config.get_text_config()
    # On one GPU nothing is sharded, so ranks need not be compared.
    compared = read if settings.tensor_parallel_size > 1 else frozenset[str]()
    ranks = loop.run(lambda: _verify(loop.client, modules, number_of_experts(text), compared))
    known, _ = candidates(modules)
    wrong = ranks[0].wrong
    if taps is not None:
        stage("comparing taps in the graph with hooks")
        loop.run(lambda: _compare(loop.client, kind))
        wrong = {**dict.fromkeys(known.keys() - taps.keys(), UNTAPPED), **wrong}
    found, reasons = missing(known, wrong, modules.num_layers)
    return ModelStructure(
        model_name=name,
        model_type=config.model_type,
        architecture=modules.architecture,
        num_layers=text.num_hidden_layers,
        d_model=text.hidden_size,
        layers_path=modules.layers_path,
        taps=found,
        missing=reasons,
        module_paths=modules.paths,
        verified_on=VERIFIED_ON,
        fused=modules.fused,
        split=split_locations(ranks),
        tapped=None if taps is None else read,
        untapped="" if taps is None else UNTAPPED,
    )


def _structure_without_capture(name: str, config: PretrainedConfig) -> ModelStructure:
    """Return the structure of a model whose hook points cannot be read."""
    text = config.get_text_config()
    return ModelStructure(
        model_name=name,
        model_type=config.model_type,
        architecture=type(config).__name__,
        num_layers=text.num_hidden_layers,
        d_model=text.hidden_size,
        layers_path="",
        taps={},
        missing=dict.fromkeys((*LAYER_HOOK_POINTS, *MODEL_HOOK_POINTS), NO_CAPTURE),
        module_paths=frozenset(),
        verified_on=NO_CAPTURE,
    )


def _declared(declared: Sequence[str], modules: Modules) -> dict[str, Tap]:
    """Return the taps that the server's configuration declares, by stored key.

    Raises:
        ResolutionError: naming one that the model does not have.
    """
    taps, unknown = declared_taps(declared, modules)
    if unknown:
        raise ResolutionError(
            f"taps: {unknown[0]!r} is not a hook point of {modules.architecture}; allowed are canonical names, stored keys, "
            "and module paths ending in .input or .output with * for a part of the path"
        )
    return taps


async def _verify(
    client: "Client", modules: Modules, n_experts: int | None, locations: frozenset[str]
) -> list[Verified]:
    """Run a request while the workers record it, and the rows' norms at some locations; returns each rank's results."""
    from vllm import SamplingParams, TokensPrompt

    await client.collective_rpc("roentgen_record", args=(sorted(locations),))
    prompt = TokensPrompt(prompt_token_ids=list(range(1, VERIFICATION_TOKENS + 1)))
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False)
    async for _ in client.generate(prompt, params, "verification"):
        pass
    replies = await client.collective_rpc("roentgen_verify", args=(modules.num_layers, n_experts or 0))
    return [unpack(reply, Verified) for reply in replies]


async def _compare(client: "Client", kind: torch.dtype) -> None:
    """Run the tokens of the verification through the graph, the last one as a decoding step, and compare the taps with hooks.

    Raises:
        ResolutionError: naming a tap whose rows differ from those of hooks.
    """
    from vllm import SamplingParams, TokensPrompt

    prompt = TokensPrompt(prompt_token_ids=list(range(1, VERIFICATION_TOKENS)))
    params = SamplingParams(
        max_tokens=2, temperature=0, ignore_eos=True, detokenize=False, allowed_token_ids=[VERIFICATION_TOKENS]
    )
    async for _ in client.generate(prompt, params, "comparison"):
        pass
    limit = TAP_ERROR.get(kind, HALF_TAP_ERROR)
    for reply in await client.collective_rpc("roentgen_compare"):
        for place, error in unpack(reply, dict).items():
            if not error <= limit:
                raise ResolutionError(
                    f"taps: {place} has other rows in vLLM's compiled graph than in the model (relative error {error:.2g} in "
                    "the median row). A graph from an old cache can cause this: VLLM_DISABLE_COMPILE_CACHE=1 builds a new one"
                )
