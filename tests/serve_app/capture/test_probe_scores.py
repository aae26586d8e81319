"""Scores computed while the model runs, against NumPy on the same request's captured rows."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from roentgen.contract import ActivationRequest, split_key
from roentgen.linear_probe import LinearProbe
from serve_app.capture.probe_scores import RequestProbe, UnscorableError
from serve_app.engines.protocol import Finished, Sampling, TextDelta
from serve_app.engines.transformers.engine import TransformersEngine
from serve_app.engines.transformers.loaded_model import LoadedModel
from tests.serve_app import tiny
from tests.serve_app.alone import plan
from tests.serve_app.capture.test_steering import steered
from tests.serve_app.tiny import Call

PROMPTS = [[5, 6, 7], [10, 11, 12, 13, 14, 15, 16, 17, 18], [40], [3, 1, 4, 1, 5, 9]]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny.loaded("llama")


@pytest.fixture
def engine(model: LoadedModel) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(model, max_prefill_tokens=12)
    yield engine
    engine.close()


def scorer(model: LoadedModel, key: str, outputs: int = 1, width: int = 32, seed: int = 0) -> RequestProbe:
    hook_point, layer = split_key(key)
    (tap,) = model.structure.resolve(ActivationRequest(layers=(layer or 0,), hook_points=(hook_point,))).values()
    generator = torch.Generator().manual_seed(seed)
    weight, mean = torch.randn(outputs, width, generator=generator), torch.randn(width, generator=generator)
    scale, bias = torch.rand(width, generator=generator) + 0.5, torch.randn(outputs, generator=generator)
    return RequestProbe(f"{key} {seed}", key, tap, LinearProbe(weight, bias, mean, scale), "label")


def by_numpy(found: RequestProbe, rows: torch.Tensor) -> np.ndarray:
    weight, bias, mean, scale = (
        getattr(found.linear_probe, part).double().numpy() for part in ("weight", "bias", "mean", "scale")
    )
    return (rows.double().numpy() - mean) / scale @ weight.T + bias


def check(result: Finished, scorers: tuple[RequestProbe, ...], n_rows: int) -> None:
    assert result.captured is not None
    for found, scores in zip(scorers, result.probed, strict=True):
        rows = result.captured.tensors[found.key]
        assert len(rows) == len(scores) == n_rows
        np.testing.assert_allclose(scores.numpy(), by_numpy(found, rows), rtol=1e-4, atol=1e-4)


def test_every_row_is_scored_whatever_the_company(model: LoadedModel, engine: TransformersEngine) -> None:
    keys = ("layers.0.resid_post", "layers.2.ln_mlp", "layers.1.mlp.gate_proj.output", "embed")
    one, other = scorer(model, keys[0]), scorer(model, keys[0], outputs=3, seed=1)
    wide, embed = scorer(model, keys[2], width=64), scorer(model, "embed", seed=3)
    asked = [(one,), (one, other), (), (embed, wide, scorer(model, keys[1], seed=2), one)]
    everything = plan(model, "resid_post", "ln_mlp", "mlp.gate_proj.output", "embed")
    calls = [Call(p, Sampling(3 + 4 * i, temperature=0), everything) for i, p in enumerate(PROMPTS)]
    for call, probes in zip(calls, asked, strict=True):
        call.job = replace(call.job, probes=probes)
    for i, (result, probes) in enumerate(zip(tiny.run(engine, calls), asked, strict=True)):
        check(result, probes, len(PROMPTS[i]) + 3 + 4 * i - 1)
        assert len(result.probed) == len(probes)


def test_a_streams_scores_join_to_the_whole(model: LoadedModel, engine: TransformersEngine) -> None:
    probes = (scorer(model, "layers.1.resid_post"), scorer(model, "layers.2.resid_pre", outputs=2))
    calls = [Call(p, Sampling(9, temperature=0), stream=True) for p in PROMPTS]
    for call in calls:
        call.job = replace(call.job, probes=probes)
    for call, result in zip(calls, tiny.run(engine, calls), strict=True):
        pieces = [event.probed for event in call.events if isinstance(event, TextDelta)]
        for number in range(2):
            told = torch.cat([piece[number] for piece in pieces])
            assert torch.equal(told, result.probed[number][: len(told)])
            assert len(told) >= len(result.probed[number]) - 1  # at most what came after the last text is missing


def test_a_probe_of_another_width_fails_alone(model: LoadedModel, engine: TransformersEngine) -> None:
    calls = [Call(PROMPTS[0], Sampling(3, temperature=0)), Call(PROMPTS[1], Sampling(3, temperature=0))]
    calls[0].job = replace(calls[0].job, probes=(scorer(model, "layers.1.mlp.gate_proj.output"),))
    calls[1].job = replace(calls[1].job, probes=(scorer(model, "layers.1.resid_post"),))
    for call in calls:
        engine.submit(call.job)
    assert len(calls[1].result().probed[0]) == len(PROMPTS[1]) + 2
    with pytest.raises(UnscorableError, match=r"gate_proj\.output has no row of 32 values per token"):
        calls[0].result()


@pytest.mark.parametrize("stream", [False, True])
def test_a_score_that_is_no_number_fails_alone(model: LoadedModel, engine: TransformersEngine, stream: bool) -> None:
    good = scorer(model, "layers.1.resid_post")
    bad = replace(good, linear_probe=replace(good.linear_probe, weight=torch.full((1, 32), 3e38)))
    call = Call(PROMPTS[0], Sampling(3, temperature=0), stream=stream)
    call.job = replace(call.job, probes=(bad,))
    with pytest.raises(UnscorableError, match="not finite"):
        tiny.run(engine, [call])
    assert tiny.run(engine, [Call(PROMPTS[0], Sampling(3, temperature=0))])


def test_steered_rows_are_scored_as_steered(model: LoadedModel, engine: TransformersEngine) -> None:
    probe = scorer(model, "layers.1.resid_post")
    call = Call(PROMPTS[3], Sampling(5, temperature=0), plan(model, "resid_post"))
    call.job = replace(call.job, probes=(probe,), steering=(steered("layers.1.resid_post").of(model),))
    (result,) = tiny.run(engine, [call])
    check(result, (probe,), 10)
