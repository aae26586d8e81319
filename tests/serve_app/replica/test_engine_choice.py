"""Which engine a configuration means, what it may say of one, and where its replicas go."""

import importlib.util
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from serve_app.app import build
from serve_app.config import ModelChoice, ServerConfig
from serve_app.engines.protocol import PrefixCaching
from serve_app.engines.vllm.loading import VllmSettings, engine_arguments, start
from serve_app.engines.vllm.requirements import EngineUnavailableError, check_batch_invariance
from serve_app.models.model_source import ModelSource
from serve_app.replica.model_slot import as_load_error, engine_for
from tests.serve_app import tiny

CHOICE = ModelChoice(model_id="m")


def test_auto_is_vllm_where_there_are_both_a_gpu_and_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec("vllm") is not None
    assert engine_for(ServerConfig(), CHOICE) == ("vllm" if there and torch.cuda.is_available() else "transformers")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("serve_app.replica.model_slot.installed", lambda: True)
    assert engine_for(ServerConfig(), CHOICE) == "vllm"
    assert engine_for(ServerConfig(device="cpu"), CHOICE) == "transformers"
    assert engine_for(ServerConfig(quantize="int8"), CHOICE) == "transformers"
    assert engine_for(ServerConfig(), ModelChoice(model_id="m", device_map="auto")) == "transformers"
    assert engine_for(ServerConfig(engine="transformers"), CHOICE) == "transformers"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"engine": "vllm", "device_map": "auto"}, "tensor_parallel_size"),
        ({"tensor_parallel_size": 2}, "set engine=vllm"),
        ({"engine": "vllm", "device": "cpu", "batch_invariant": True}, "set engine=transformers"),
        ({"engine": "vllm", "quantize": "int8"}, "quantize: the vLLM engine cannot .* set engine=transformers"),
        ({"device": "cuda", "quantize": "int8"}, "quantize: int8 is available only on a CPU; set device=cpu"),
        ({"quantize": "int8", "device_map": "auto"}, "quantize: int8 is available only on a CPU"),
        ({"quantize": "int4"}, "'int8'"),
        ({"engine": "tensorrt"}, "'auto', 'transformers' or 'vllm'"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ServerConfig.model_validate(options)


def test_vllm_is_batch_invariant_where_it_says_so() -> None:
    check_batch_invariance((8, 0))
    check_batch_invariance((9, 0))
    for capability, said in (((7, 5), "compute capability 7.5"), (None, "a CPU")):
        with pytest.raises(EngineUnavailableError, match=f"batch_invariant: .*{said}"):
            check_batch_invariance(capability)


def test_a_model_that_is_split_has_its_gpus_in_one_bundle() -> None:
    config = ServerConfig(engine="vllm", tensor_parallel_size=4, num_replicas=2, max_replicas_per_node=2)
    (model,) = build(config)._bound_deployment.init_args[:1]
    deployment = model._bound_deployment
    assert deployment._replica_config.max_replicas_per_node is None
    assert deployment._replica_config.placement_group_bundles == [{"CPU": 1, "GPU": 4}]
    assert deployment._replica_config.placement_group_strategy == "STRICT_PACK"
    assert deployment.ray_actor_options["num_gpus"] == 4


def test_on_a_cpu_its_parts_reserve_nothing() -> None:
    config = ServerConfig(engine="vllm", tensor_parallel_size=2, device="cpu")
    (model,) = build(config)._bound_deployment.init_args[:1]
    deployment = model._bound_deployment
    assert deployment._replica_config.placement_group_bundles is None
    assert (deployment.ray_actor_options["num_cpus"], deployment.ray_actor_options["num_gpus"]) == (1, 0)


def test_gpus_that_no_node_has_are_said_to_be_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = [{"Resources": {"CPU": 8, "GPU": count}} for count in (2, 3)] + [{"Resources": {"CPU": 8}}]
    monkeypatch.setattr("serve_app.app.ray.is_initialized", lambda: True)
    monkeypatch.setattr("serve_app.app.ray.nodes", lambda: nodes)
    build(ServerConfig(engine="vllm", tensor_parallel_size=3))
    assert not caplog.messages
    build(ServerConfig(engine="vllm", tensor_parallel_size=4))
    assert caplog.messages == ["tensor_parallel_size: a replica waits for a node with 4 GPUs; no node has more than 3"]


def settings(**changed: object) -> VllmSettings:
    usual = {"dtype": "auto", "device": "cpu", "max_batch": 8, "max_queue": 8, "max_cache_tokens": 0}
    usual |= {"tensor_parallel_size": 1, "threads": 1, "capture": True, "taps": (), "store": "s"}
    return VllmSettings(**{**usual, **changed})


def test_a_server_says_why_its_prefix_cache_is_off() -> None:
    assert settings(capture=False).prefix_caching == PrefixCaching(True)
    assert settings().prefix_caching == PrefixCaching(True)
    assert "no rows of tokens" in settings(eager=True).prefix_caching.reason
    assert "--batch-invariant" in settings(batch_invariant=True).prefix_caching.reason
    assert "switched off" in settings(capture=False, prefix_cache=False).prefix_caching.reason


def test_what_vllm_is_started_with() -> None:
    config = tiny.config("wide_llama")
    place, kind = torch.device("cuda"), torch.bfloat16
    capturing = engine_arguments(config, settings(), place, kind)
    assert "block_size" not in capturing
    assert engine_arguments(config, settings(), torch.device("cpu"), kind)["block_size"] == 32
    # Whether a model can have a prefix cache is vLLM's to say.
    assert (capturing["enable_prefix_caching"], capturing["enable_chunked_prefill"]) == (None, True)
    assert "max_num_batched_tokens" not in capturing
    assert engine_arguments(config, settings(max_prefill_tokens=64), place, kind)["max_num_batched_tokens"] == 64
    assert engine_arguments(config, settings(max_prefill_tokens=2), place, kind)["max_num_batched_tokens"] == 8
    eager = engine_arguments(config, settings(eager=True, max_prefill_tokens=64), place, kind)
    assert (eager["enable_prefix_caching"], eager["enable_chunked_prefill"]) == (False, False)
    assert "max_num_batched_tokens" not in eager
    assert (capturing["max_model_len"], capturing["distributed_executor_backend"]) == (512, "uni")
    assert "kv_cache_memory_bytes" not in capturing
    plain = engine_arguments(config, settings(capture=False, tensor_parallel_size=2), place, kind)
    assert (plain["enable_prefix_caching"], plain["enable_chunked_prefill"]) == (None, True)
    off = engine_arguments(config, settings(capture=False, prefix_cache=False), place, kind)
    assert off["enable_prefix_caching"] is False
    assert (plain["tensor_parallel_size"], plain["distributed_executor_backend"]) == (2, "mp")
    # Two tensors of 3 layers, 1 head of 32 numbers, 2 bytes each; 384 tokens and a block that vLLM keeps for itself.
    small = engine_arguments(config, settings(max_cache_tokens=300), place, kind)
    assert (small["max_model_len"], small["kv_cache_memory_bytes"]) == (300, (384 + 128) * 2 * 3 * 32 * 2)
    heads = config.__class__(**{**config.to_dict(), "num_key_value_heads": 2})
    halves = engine_arguments(heads, settings(max_cache_tokens=300, tensor_parallel_size=2), place, kind)
    assert halves["kv_cache_memory_bytes"] == small["kv_cache_memory_bytes"]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_the_choice_of_it_is_an_error_of_whoever_chose() -> None:
    with pytest.raises(EngineUnavailableError, match="vllm is not installed here; use engine=transformers") as refused:
        start(ModelSource("m", "m", "0"), settings())
    assert as_load_error(refused.value).status == 400
