"""vLLM as a way to generate: run where it is installed (`make test-vllm`), and said to be missing where it is not."""

import importlib.util

import pytest

from benchmarks.column import loaded_way, run_column
from benchmarks.workload import Workload

INSTALLED = importlib.util.find_spec("vllm") is not None


@pytest.mark.skipif(INSTALLED, reason="vLLM is installed")
def test_where_it_is_not_installed_a_column_says_how_it_would_be() -> None:
    column = run_column("vllm", 2, 2, Workload(problems="arithmetic", max_tokens=4))
    assert "make bench-vllm" in column.skipped


@pytest.mark.skipif(not INSTALLED, reason="vLLM is not installed; make test-vllm runs this")
@pytest.mark.integration
def test_it_generates_as_many_tokens_as_transformers() -> None:
    workload = Workload(problems="arithmetic", max_tokens=24, dtype="float32", device="cpu")
    prompts = workload.prompts(workload.tokenizer(), 4)
    with loaded_way("generate", workload, 4) as (way, _):
        expected = way(prompts, 24, 1)
    with loaded_way("vllm", workload, 2) as (way, _):
        found = way(prompts, 24, 2)
    assert (found.tokens, found.prompt_tokens) == (expected.tokens, expected.prompt_tokens)
    assert all(0 < seconds <= found.seconds for seconds in found.first_token_s)
