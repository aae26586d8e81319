"""Every way generates the same tokens; how fast they are is for the benchmarks to say."""

from pathlib import Path

import pytest
import torch

from benchmarks.column import run_column
from benchmarks.memory import MemorySample, growth, report, sparkline
from benchmarks.pairs import interleave
from benchmarks.ways import UnavailableError, Way, continuous_way, end_tokens, engine_way, generate_way, seed_way
from benchmarks.workload import CAPTURES, RANDOM_MODELS, Workload, capture_request
from serve_app.engines.transformers.engine import TransformersEngine
from tests.serve_app import tiny

PROMPTS = [[5, 6, 7], [10, 11, 12, 13, 14, 15, 16, 17, 18], [40], [3, 1, 4, 1, 5, 9]]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Workload:
    """A shape that loads at once; generated sums as problems."""
    shape = RANDOM_MODELS["qwen3-0.6b"] | {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 300,
    }
    monkeypatch.setitem(RANDOM_MODELS, "small", shape)
    return Workload(random_weights="small", problems="arithmetic", max_tokens=5, dtype="float32", device="cpu")


def check(way: Way, in_flight: int, tokens: int) -> None:
    run = way(PROMPTS, 6, in_flight)
    assert run.tokens == tokens
    assert run.prompt_tokens == sum(map(len, PROMPTS))
    assert len(run.first_token_s) == len(PROMPTS)
    assert all(0 < seconds <= run.seconds for seconds in run.first_token_s)


def test_all_ways_generate_as_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """An end-of-text token that one of the completions has makes them differ in length."""
    model, plain = tiny.loaded(), tiny.module("llama")
    with torch.inference_mode():
        early = plain.generate(torch.tensor([PROMPTS[1]]), max_new_tokens=3, do_sample=False)[0, -1]
    for module in (plain, model.observed._module):
        monkeypatch.setattr(module.generation_config, "eos_token_id", int(early))
    end = end_tokens(plain, tiny.tokenizer())
    expected = generate_way(plain, end)(PROMPTS, 6, 1).tokens
    assert expected < 6 * len(PROMPTS)
    check(generate_way(plain, end), 3, expected)
    engine = TransformersEngine(model)
    for capture in CAPTURES:
        check(engine_way(engine, model, capture), 2, expected)
    engine.close()
    check(continuous_way(plain, end), 2, expected)
    check(seed_way(plain, tiny.tokenizer()), 1, expected)
    with pytest.raises(UnavailableError, match="one request at a time"):
        seed_way(plain, tiny.tokenizer())(PROMPTS, 6, 2)


def test_a_column_of_a_model_with_random_weights(small: Workload) -> None:
    column = run_column("engine-all", 2, 3, small)
    assert column.tokens == 15
    assert column.peak_bytes > 1e6
    assert column.rate > 0
    assert column.weights is not None
    assert run_column("seed", 2, 3, small).skipped == "one request at a time is all it does"


def test_a_random_model_can_be_saved_for_a_server(small: Workload, tmp_path: Path) -> None:
    saved = small.saved(tmp_path)
    assert saved.load().structure.num_layers == 4
    assert saved.prompts(saved.tokenizer(), 2) == small.prompts(small.tokenizer(), 2)
    assert saved.saved(tmp_path) == saved


def test_captures_as_a_client_asks_for_them() -> None:
    three = capture_request(30, "3x2")
    assert three is not None
    assert three.layers == (7, 15, 22)
    assert capture_request(30, "none") is None


def test_rounds_alternate_their_order() -> None:
    order: list[str] = []
    arms = {name: lambda name=name: float(len(order) + bool(order.append(name))) for name in "ab"}  # type: ignore[func-returns-value]
    found = interleave(arms, 3)
    assert "".join(order) == "abbaab"
    assert found == {"a": [0, 3, 4], "b": [1, 2, 5]}


def test_memory_that_grows_is_not_called_flat() -> None:
    flat = [MemorySample(50 * i, 1_000_000_000 + (-1) ** i * 1_000_000) for i in range(1, 21)]
    grows = [MemorySample(50 * i, 1_000_000_000 + 10_000_000 * i) for i in range(1, 21)]
    assert abs(growth(flat).estimate) < 1_000
    assert growth(grows).estimate == pytest.approx(200_000)
    assert "**Flat**" in report(Workload(), "3x2", flat, 8)
    assert "**Not flat**" in report(Workload(), "3x2", grows, 8)


def test_sparkline() -> None:
    assert sparkline([1, 4, 8]) == "▂▅█"
