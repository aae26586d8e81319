"""What the benchmark of batch-invariance counts, on a tiny model."""

import pytest
import torch

from benchmarks.invariance import agreement, measure_agreement
from benchmarks.ways import finish_all
from benchmarks.workload import capture_plan
from serve_app.engines.protocol import Sampling
from serve_app.engines.transformers.engine import TransformersEngine
from tests.serve_app import tiny

PROMPTS = [[(7 * number + 3 * i) % 250 for i in range(3 + 4 * number)] for number in range(5)]


def test_with_the_mode_all_agree_to_the_last_bit() -> None:
    model = tiny.loaded("llama")
    engine = TransformersEngine(model, batch_invariant=True)
    found = measure_agreement(engine, model, PROMPTS, 4, 5)
    engine.close()
    assert [(what, decoding) for what, decoding, _ in found] == [
        ("alone, again", "greedy"),
        ("alone, again", "seeded"),
        ("alone and among 4 others", "greedy"),
        ("alone and among 4 others", "seeded"),
    ]
    for _, _, one in found:
        assert (one.requests, one.tokens, one.logprobs, one.rows, one.apart) == (2, 2, 2, 2, 0.0)


def test_what_differs_is_counted() -> None:
    model = tiny.loaded("llama")
    engine = TransformersEngine(model)
    plan = capture_plan(model, "all")
    settings = [Sampling(12, temperature=2, seed=seed, min_tokens=12) for seed in (1, 2)]
    one, other = (finish_all(engine, [(PROMPTS[1], chosen)], plan) for chosen in settings)
    engine.close()
    found = agreement([PROMPTS[1]], one, other)
    assert one[0].token_ids != other[0].token_ids
    assert (found.requests, found.tokens, found.logprobs, found.rows) == (1, 0, 0, 0)
    assert found.apart < 1e-4, "rows are compared only where the same tokens were read"
    with torch.inference_mode():
        assert other[0].captured is not None
        for tensor in other[0].captured.tensors.values():
            tensor[0] *= 1.01
    assert agreement([PROMPTS[1]], one, other).apart == pytest.approx(0.01, rel=0.1)
