"""Grouped attention against transformers' own, on the same numbers."""

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from serve_app.engines.transformers.grouped_attention import GROUPED, grouped_attention, use_grouped_attention
from tests.serve_app import tiny


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("kv_heads", [1, 3, 9])
@pytest.mark.parametrize("padded", [False, True])
def test_the_same_as_transformers_sdpa(tokens: int, kv_heads: int, padded: bool) -> None:
    torch.manual_seed(0)
    query = torch.randn(4, 9, tokens, 16)
    key, value = torch.randn(2, 4, kv_heads, 12, 16)
    mask = None
    if padded:
        mask = torch.ones(4, 1, tokens, 12, dtype=torch.bool)
        mask[1, :, :, :7] = False
        mask[3, :, :, :2] = False
    module = torch.nn.Module()
    module.num_key_value_groups = 9 // kv_heads
    module.is_causal = False
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    ours, _ = grouped_attention(module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_a_model_that_needs_another_implementation_keeps_it() -> None:
    model = tiny.module("llama")
    use_grouped_attention(model)
    assert model.config._attn_implementation == GROUPED
    eager = tiny.module("llama")
    eager.set_attn_implementation("eager")
    use_grouped_attention(eager)
    assert eager.config._attn_implementation == "eager"
