import pytest
import torch

from benchmarks.limits import Limits, WeightBytes, measure_limits
from tests.serve_app import tiny

LIMITS = Limits(bytes_per_s=100.0, flops=1000.0)
WEIGHTS = WeightBytes(body=90, head=10, n_bytes=400)


def test_a_step_takes_as_long_as_the_slower_of_reading_and_computing() -> None:
    assert LIMITS.forward_s(WEIGHTS, 1, 1) == 4.0  # 400 bytes; 200 operations would take 0.2 s
    assert LIMITS.forward_s(WEIGHTS, 100, 100) == 20.0  # 20,000 operations
    assert LIMITS.forward_s(WEIGHTS, 100, 0) == 18.0


def test_a_workload_reads_its_prompts_once_and_then_steps() -> None:
    read = LIMITS.forward_s(WEIGHTS, 500, 5)
    assert LIMITS.generation_s(WEIGHTS, prompts=5, prompt_tokens=500, generated=25, in_flight=5) == read + 4 * 4.0


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_embedding_that_is_no_head_is_not_counted(architecture: str) -> None:
    module = tiny.module(architecture)
    weights, everything = WeightBytes.of(module), sum(p.numel() for p in module.parameters())
    tied = architecture == "gpt2"
    assert weights.head == 257 * 32
    assert weights.body + weights.head == everything - (0 if tied else 257 * 32)
    assert weights.n_bytes == 4 * (weights.body + weights.head)


def test_a_machine_has_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.limits.MATVEC_BYTES", 1 << 20)
    monkeypatch.setattr("benchmarks.limits.MATMUL_SIZE", 64)
    found = measure_limits(torch.device("cpu"), torch.float32)
    assert found.bytes_per_s > 0
    assert found.flops > 0
