"""The independent path that stored activations are checked against: transformers alone, plain PyTorch hooks, one sequence
at a time, teacher-forced."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import transformers

from serve_app.models.model_source import locate


@cache
def smollm2() -> transformers.LlamaForCausalLM:
    """The embedded model in float32, loaded by transformers with no nnsight around it."""
    return transformers.AutoModelForCausalLM.from_pretrained(locate("smollm2-135m").path, dtype=torch.float32).eval()


def teacher_forced(tokens: Sequence[int], layers: Sequence[int]) -> dict[str, torch.Tensor]:
    """Read the outputs of both norms and of the block, at some layers, for every token: stored key to `[rows, d_model]`."""
    model, seen, handles = smollm2(), {}, []

    def keep(key: str, module: torch.nn.Module) -> None:
        def hook(module: Any, args: Any, output: Any) -> None:
            seen[key] = (output[0] if isinstance(output, tuple) else output)[0]

        handles.append(module.register_forward_hook(hook))

    for layer in layers:
        block = model.model.layers[layer]
        keep(f"layers.{layer}.ln_attn", block.input_layernorm)
        keep(f"layers.{layer}.ln_mlp", block.post_attention_layernorm)
        keep(f"layers.{layer}.resid_post", block)
    with torch.inference_mode():
        model(input_ids=torch.tensor([list(tokens)]), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def worst_error(rows: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest error of any element of a row, relative to that row's norm."""
    assert rows.shape == expected.shape
    return float(((rows - expected).abs().amax(1) / expected.norm(dim=1)).max())
