"""The independent paths: one prompt alone, through transformers' own `generate`, or a forward with plain PyTorch hooks."""

from typing import Any

import torch

from roentgen.contract import ActivationRequest, Positions
from serve_app.capture.rows import CapturePlan
from serve_app.engines.transformers.loaded_model import LoadedModel
from tests.serve_app import tiny

# Where plain hooks find hook points: the module below a layer, and its side; written from the architectures' sources.
LLAMA_MODULES = {
    "resid_pre": ("", "input"),
    "resid_mid": (".post_attention_layernorm", "input"),
    "resid_post": ("", "output"),
    "attn_out": (".self_attn", "output"),
    "mlp_out": (".mlp", "output"),
    "ln_attn": (".input_layernorm", "output"),
    "ln_mlp": (".post_attention_layernorm", "output"),
}


def plan(model: LoadedModel, *hook_points: str, layers: Any = "all", positions: str = "all") -> CapturePlan:
    taps = model.structure.resolve(ActivationRequest(layers=layers, hook_points=hook_points))
    return CapturePlan(taps, Positions.parse(positions), "model")


def generate_alone(model: LoadedModel, prompt: list[int], max_tokens: int) -> list[int]:
    """Greedy completion by transformers' own generate, one prompt at a time, with transformers' own attention."""
    ids = torch.tensor([prompt])
    plain = tiny.module(model.source.name.removeprefix("tiny-"))
    plain.generation_config = model.observed._module.generation_config
    with torch.inference_mode():
        output = plain.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens)
    return output[0, len(prompt) :].tolist()


def layer_path(model: LoadedModel) -> str:
    return model.structure.layers_path


def forward_with_hooks(
    model: LoadedModel, tokens: list[int], modules: dict[str, tuple[str, str]]
) -> dict[str, torch.Tensor]:
    """Run the tokens alone, teacher-forced, and read modules' inputs and outputs with plain PyTorch hooks."""
    seen: dict[str, torch.Tensor] = {}
    root, handles = model.observed._module, []
    for key, (path, side) in modules.items():

        def hook(module: Any, args: Any, kwargs: Any, output: Any, key: str = key, side: str = side) -> None:
            value = output if side == "output" else (args[0] if args else kwargs["hidden_states"])
            seen[key] = (value[0] if isinstance(value, tuple) else value)[0].clone()

        handles.append(root.get_submodule(path).register_forward_hook(hook, with_kwargs=True))
    with torch.inference_mode():
        root(input_ids=torch.tensor([tokens]), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen
