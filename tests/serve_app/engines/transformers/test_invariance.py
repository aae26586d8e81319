"""Batch-invariant mode: a request has the same bits alone, among others, and with its prompt read in other pieces."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from serve_app.engines.protocol import Finished, Sampling
from serve_app.engines.transformers import engine
from serve_app.engines.transformers.engine import TransformersEngine
from serve_app.engines.transformers.invariance import FixedShapes, cancelling, same_bits, settle
from serve_app.engines.transformers.loaded_model import LoadedModel
from serve_app.engines.transformers.model_cache import inspect_cache
from tests.serve_app import tiny
from tests.serve_app.alone import plan
from tests.serve_app.tiny import Call

ALONE = ["mixtral", "lfm2"]


def calls(model: LoadedModel) -> list[Call]:
    """Eighteen requests of different lengths, greedy and seeded, that keep every layer's rows."""
    asked = plan(model, "resid_post", "attn_out")
    made = []
    for number in range(18):
        prompt = [(7 * number + 3 * i) % 250 for i in range(2 + 5 * (number % 7))]
        settings = Sampling(6 + number % 5, temperature=float(number % 3 > 0), seed=number, top_logprobs=2)
        if number % 3 == 2:
            settings = replace(settings, top_p=0.9, top_k=20, repetition_penalty=1.2)
        made.append(Call(prompt, settings, asked))
    return made


def bits(result: Finished) -> dict[str, object]:
    assert result.captured is not None
    rows = {key: value.view(torch.uint8).numpy().tobytes() for key, value in result.captured.tensors.items()}
    return {"tokens": result.token_ids, "scores": result.scores, **rows}


def in_dtype(architecture: str, dtype: torch.dtype) -> LoadedModel:
    model = tiny.loaded(architecture)
    model.observed._module.to(dtype)
    return replace(model, dtype=dtype)


def differing(model: LoadedModel, *, batch_invariant: bool) -> int:
    """Run all together, and some of them alone, where less is read at a time; returns how many of these differ."""
    engine = TransformersEngine(model, batch_invariant=batch_invariant)
    together = calls(model)
    for call in together:
        engine.submit(call.job)
    among = [bits(call.result()) for call in together]
    engine.close()
    engine = TransformersEngine(model, max_batch=4, max_prefill_tokens=4, batch_invariant=batch_invariant)
    alone = []
    for call in calls(model)[::3]:
        engine.submit(call.job)
        alone.append(bits(call.result()))
    engine.close()
    return sum(one != many for one, many in zip(alone, among[::3], strict=True))


def finalize_rows(model: LoadedModel, max_batch: int) -> tuple[FixedShapes | None, str]:
    return settle(model, inspect_cache(model.observed._module, model.device), max_batch)


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [*((name, torch.float32) for name in ("llama", "gemma2", "gpt2", *ALONE)), ("qwen3", torch.bfloat16)],
)
def test_a_request_gives_the_same_bits_alone_and_among_others(
    architecture: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "PIECE", 8)  # so that others decode between a prompt's pieces
    model = in_dtype(architecture, dtype)
    assert (finalize_rows(model, 18)[0] is None) == (architecture in ALONE)
    assert differing(model, batch_invariant=True) == 0


def test_without_it_the_bits_depend_on_the_batch() -> None:
    assert differing(in_dtype("llama", torch.float32), batch_invariant=False) > 0


@pytest.mark.parametrize("broken", ["_product", "_attention"])
def test_a_step_whose_shapes_are_not_fixed_is_found_out(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows do not have the same bits as alone, and the model runs one request at a time."""
    if broken == "_product":
        monkeypatch.setattr(FixedShapes, broken, lambda _self, func, args, options: func(*args, **options))
    else:
        plain = functional.scaled_dot_product_attention
        monkeypatch.setattr(FixedShapes, broken, lambda _self, *args, **options: plain(*args, **options))
    shapes, reason = finalize_rows(in_dtype("llama", torch.float32), 18)
    assert shapes is None
    assert "the same bits as alone" in reason


def test_attention_that_is_not_known_runs_alone() -> None:
    model = tiny.loaded("llama")
    model.observed._module.set_attn_implementation("eager")
    assert "it calls" in finalize_rows(model, 8)[1]


def test_heights_whose_bits_agree_are_found() -> None:
    def product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Of 4 to 16 rows one sum, of fewer another, of more a third, which also depends on the place."""
        if len(rows) > 16:
            return rows @ weight + torch.arange(len(rows))[:, None]
        return rows @ weight + (0 if len(rows) >= 4 else 1)

    rows = torch.randn(64, 1)  # one product, and nothing to add up: PyTorch's own has the same bits in any shape
    assert same_bits(product, rows, torch.ones(1, 1)) == (4, 8, 16)
    assert same_bits(lambda x, weight: x * weight, rows, torch.ones(1, 1)) == (1, 2, 4, 8, 16, 32, 64)


@pytest.mark.parametrize("transposed", [True, False])
def test_what_heights_are_measured_on_shows_the_order_of_additions(transposed: bool) -> None:
    weight = torch.zeros(40, 96, dtype=torch.bfloat16) if transposed else torch.zeros(96, 40, dtype=torch.bfloat16)
    rows, other = cancelling(torch.zeros(1, 96, dtype=torch.bfloat16), weight, transposed=transposed)
    other = (other.mT if transposed else other).float()
    assert (rows.double() @ other.double()).abs().max() < 1e-9, "exactly 0, but for the rounding of float64"
    one = rows.float() @ other
    half = rows[:, ::2].float() @ other[::2] + rows[:, 1::2].float() @ other[1::2]
    assert (one.bfloat16() != half.bfloat16()).float().mean() > 0.3


@pytest.mark.parametrize("rows", [1, 3, 16, 70])
def test_tiles_are_the_product(rows: int) -> None:
    x, weight, bias = torch.randn(rows, 1, 24), torch.randn(40, 24), torch.randn(40)
    with FixedShapes().step(torch.ones(rows, 5, dtype=torch.long)):
        found = functional.linear(x, weight, bias), torch.addmm(bias, x[:, 0], weight.T), x @ weight.T
    expected = functional.linear(x, weight, bias)
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found[1], expected[:, 0])
    torch.testing.assert_close(found[2], expected - bias)


def test_a_row_attends_to_its_own_columns() -> None:
    query, key, value = (torch.randn(3, 2, width, 8) for width in (1, 6, 6))
    padding = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0] * 5 + [1]])
    window = (padding * torch.tensor([0, 0, 0, 1, 1, 1])).bool()[:, None, None]
    for mask in (padding.bool()[:, None, None], window):
        expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        with FixedShapes().step(padding):
            found = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        torch.testing.assert_close(found, expected)
