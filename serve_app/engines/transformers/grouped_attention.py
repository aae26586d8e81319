"""Computes decoding attention with grouped-query heads: query heads that share a KV head become positions of one query.

With grouped-query attention, transformers repeats each KV head for every query head that it serves, and scaled dot-product
attention then runs one single-row product per query head. With one new token per row there is a cheaper form: `[batch, heads,
1, d]` viewed as `[batch, kv_heads, group, d]` is a query of `group` positions for each KV head, and needs no repeat. Prefills,
models without grouped heads, and calls with an option that only transformers' function supports use transformers' own path.

The switch changes the name of the model's attention, and a model's code may depend on that name: some skip a sparse mask
unless it is "eager" or "sdpa". So `load_checks` compares a switched model with the original before it keeps the switch.
"""

import inspect
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

GROUPED = "roentgen_grouped"

OTHER_OPTIONS = tuple(
    name
    for name, parameter in inspect.signature(sdpa_attention_forward).parameters.items()
    if parameter.default is None and name not in ("scaling", "is_causal")
)
"""Options of transformers' `sdpa` besides a mask and a scale (`is_causal` means nothing for one token)."""


def grouped_attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads tokens d"],
    key: Float[Tensor, "batch kv_heads context d"],
    value: Float[Tensor, "batch kv_heads context d"],
    attention_mask: Bool[Tensor, "batch 1 tokens context"] | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "batch tokens heads d"], None]:
    """Compute attention through transformers' attention interface; the result is that of its `sdpa`, up to rounding."""
    if (
        query.shape[2] > 1
        or key.shape[1] == query.shape[1]
        or (attention_mask is not None and attention_mask.shape[1] > 1)  # a mask per head
        or any(options.get(name) is not None for name in OTHER_OPTIONS)
    ):
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
        return output, None
    return attend_to_cache(query, key, value, attention_mask, scaling), None


def attend_to_cache(
    query: Float[Tensor, "batch heads 1 d"],
    key: Float[Tensor, "batch kv_heads context d"],
    value: Float[Tensor, "batch kv_heads context d"],
    mask: Bool[Tensor, "batch 1 1 context"] | Float[Tensor, "batch 1 1 context"] | None,
    scaling: float | None,
) -> Float[Tensor, "batch 1 heads d"]:
    """Attend from one new token per row.

    A Boolean mask says which columns are visible; a numeric mask is added to the weights.
    """
    batch, heads, _, d = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, d)
    attended = torch.nn.functional.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return attended.reshape(batch, 1, heads, value.shape[-1])


def use_grouped_attention(model: PreTrainedModel) -> None:
    """Switch a model that uses `sdpa` to grouped decoding; a model that needs another implementation keeps it."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(GROUPED, grouped_attention)
        AttentionMaskInterface.register(GROUPED, sdpa_mask)
        model.set_attn_implementation(GROUPED)
