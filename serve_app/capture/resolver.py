"""Finds where a model's hook points are, by watching a forward rather than by trusting names.

Names lie: in Gemma 2 `post_attention_layernorm` normalises attention's output, in Llama it is the norm before the MLP. So
the resolver runs one short forward with plain PyTorch hooks on every direct child of every decoder layer, and decides by
value what each child is:

1. The decoder layers are the longest `ModuleList` of the model. A layer's input x is `resid_pre`, its output y `resid_post`.
2. Attention is the child whose class or name says so; its contribution a is its output, or the output of a norm fed by it.
3. If a later child is fed x + a, that input is `resid_mid`, and the block is sequential; otherwise, if a + m + x = y for
   a later child's output m, the block is parallel and has no `resid_mid`.
4. `mlp_out` is the later child's output m with resid_mid + m = y. `ln_attn` and `ln_mlp` are the norms fed with x and with
   resid_mid (in a parallel block: the norms whose outputs feed attention and the MLP).

What satisfies no equation is reported as missing, with the reason, and refused when asked for: never guessed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from roentgen.contract import stored_key
from serve_app.capture.structure import ModelStructure, Tap


class ResolutionError(Exception):
    """The model's decoder layers could not be found."""


@dataclass(frozen=True)
class _Visit:
    """What one child of a layer was given and gave, in a forward."""

    name: str
    module: nn.Module
    taken: Float[Tensor, "batch tokens width"]
    given: Float[Tensor, "batch tokens width"]

    @property
    def is_norm(self) -> bool:
        return "norm" in type(self.module).__name__.lower() or "norm" in self.name.lower()

    @property
    def is_attention(self) -> bool:
        return "attn" in self.name.lower() or "attention" in (self.name + type(self.module).__name__).lower()


def resolve_structure(model: PreTrainedModel, model_name: str) -> ModelStructure:
    """Find and verify a model's hook points with one short forward.

    Raises:
        ResolutionError: if it has no list of decoder layers, or they do not pass a residual stream.
    """
    layers_path, layers = _decoder_layers(model)
    config = model.config.get_text_config()
    n_probe = min(8, config.vocab_size)
    tokens = torch.arange(n_probe, device=next(model.parameters()).device)[None]
    with torch.inference_mode(), _watched(layers) as visits, _edges(layers) as edges:
        model(input_ids=tokens, use_cache=False)

    taps: dict[str, Tap] = {}
    missing: dict[str, str] = {}
    for index in range(len(layers)):
        if index not in edges:
            raise ResolutionError(f"{layers_path}.{index} did not run in a forward")
        own, absent = _resolve_layer(f"{layers_path}.{index}", *edges[index], visits.get(index, []))
        taps.update({stored_key(name, index): tap for name, tap in own.items()})
        missing.update({name: reason for name, reason in absent.items() if name not in missing})
    own, absent = _resolve_shared(model, edges, len(layers), tokens)
    return ModelStructure(
        model_name=model_name,
        model_type=model.config.model_type,
        architecture=type(model).__name__,
        num_layers=len(layers),
        d_model=edges[0][0].shape[-1],
        layers_path=layers_path,
        taps=taps | own,
        missing=missing | absent,
        module_paths=frozenset(name for name, _ in model.named_modules() if name),
    )


def first_tensor(value: Any) -> Tensor:
    """Return the hidden states of a module's input or output, however the architecture packs them.

    Outputs are a tensor or a tuple that starts with one; inputs are `(args, kwargs)`, with the hidden states as the first
    tensor of either.

    Raises:
        TypeError: if there is no tensor.
    """
    if isinstance(value, Tensor):
        return value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    for part in parts:
        if isinstance(part, Tensor | tuple | dict) and len(part):
            return first_tensor(part)
    raise TypeError(f"no tensor in a {type(value).__name__}")


def _decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the longest list of modules of one class that are not nested in another such list."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    top = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
    if not top:
        raise ResolutionError(f"{type(model).__name__} has no list of decoder layers")
    return max(top, key=lambda item: len(item[1]))


@contextmanager
def _watched(layers: nn.ModuleList) -> Iterator[dict[int, list[_Visit]]]:
    """Record what each direct child of each layer takes and gives, in the order they run."""
    visits: dict[int, list[_Visit]] = {}
    handles = []
    for index, layer in enumerate(layers):
        for name, child in layer.named_children():

            def hook(
                module: nn.Module, args: Any, kwargs: Any, output: Any, index: int = index, name: str = name
            ) -> None:
                try:
                    taken, given = first_tensor((args, kwargs)), first_tensor(output)
                except TypeError:
                    return  # a child that passes no tensor is no hook point
                visits.setdefault(index, []).append(_Visit(name, module, taken.clone(), given.clone()))

            handles.append(child.register_forward_hook(hook, with_kwargs=True))
    try:
        yield visits
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _edges(layers: nn.ModuleList) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Record what enters and leaves each layer."""
    edges: dict[int, tuple[Tensor, Tensor]] = {}
    entering: dict[int, Tensor] = {}
    handles = []
    for index, layer in enumerate(layers):

        def before(module: nn.Module, args: Any, kwargs: Any, index: int = index) -> None:
            # Cloned before the layer runs: a layer may add to its input in place.
            entering[index] = first_tensor((args, kwargs)).clone()

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any, index: int = index) -> None:
            edges[index] = entering[index], first_tensor(output).clone()

        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.register_forward_hook(after, with_kwargs=True))
    try:
        yield edges
    finally:
        for handle in handles:
            handle.remove()


def _resolve_layer(path: str, x: Tensor, y: Tensor, visits: list[_Visit]) -> tuple[dict[str, Tap], dict[str, str]]:
    """Decide one layer's hook points from what its children took and gave."""
    taps = {"resid_pre": Tap(path, "input"), "resid_post": Tap(path, "output")}
    missing: dict[str, str] = {}
    attention = next((v for v in visits if v.is_attention and not v.is_norm), None)
    if attention is None:
        reason = f"{path} has no attention module"
        return taps, dict.fromkeys(("resid_mid", "attn_out", "mlp_out", "ln_attn", "ln_mlp"), reason)
    after = visits[visits.index(attention) + 1 :]

    # What attention adds: its output, or that of a norm applied to it.
    additions = [v for v in after if v.is_norm and _same(v.taken, attention.given)] + [attention]
    middle = next(((v, a) for a in additions for v in after if _same(v.taken, x + a.given)), None)
    norms_before = [v for v in visits if v.is_norm and _same(v.taken, x)]
    if middle is not None:
        first, addition = middle
        taps["resid_mid"] = Tap(f"{path}.{first.name}", "input")
        taps["attn_out"] = Tap(f"{path}.{addition.name}", "output")
        mlp = next((v for v in after if _same(y, x + addition.given + v.given)), None)
        norm_mlp = first if first.is_norm else None
    else:
        missing["resid_mid"] = "its block adds attention and MLP to the stream in parallel"
        others = [v for v in visits if v is not attention and not v.is_norm]
        mlp = next((v for v in others if _same(y, x + attention.given + v.given)), None)
        if mlp is not None:
            taps["attn_out"] = Tap(f"{path}.{attention.name}", "output")
        else:
            missing["resid_mid"] = missing["attn_out"] = "no module's output adds up to the stream after attention"
        norm_mlp = next((v for v in norms_before if mlp is not None and _same(v.given, mlp.taken)), None)
    if mlp is not None:
        taps["mlp_out"] = Tap(f"{path}.{mlp.name}", "output")
    else:
        missing["mlp_out"] = "no module's output adds up to the stream leaving the block"
    norm_attention = next((v for v in norms_before if _same(v.given, attention.taken)), None)
    for name, norm, what in (("ln_attn", norm_attention, "attention"), ("ln_mlp", norm_mlp, "the MLP")):
        if norm is not None:
            taps[name] = Tap(f"{path}.{norm.name}", "output")
        else:
            missing[name] = f"its block has no norm between the stream and {what}"
    return taps, missing


def _resolve_shared(
    model: PreTrainedModel, edges: dict[int, tuple[Tensor, Tensor]], n_layers: int, tokens: Tensor
) -> tuple[dict[str, Tap], dict[str, str]]:
    """Find the embedding and the norm after the last layer; both are verified by a second forward."""
    taps: dict[str, Tap] = {}
    missing: dict[str, str] = {}
    names = {id(module): name for name, module in model.named_modules()}
    taps["embed"] = Tap(names[id(model.get_input_embeddings())], "output")
    last = edges[n_layers - 1][1]
    norms: list[str] = []
    handles = []
    for name, module in model.named_modules():
        if "norm" in type(module).__name__.lower():

            def hook(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                if _same(first_tensor((args, {})), last):
                    norms.append(name)

            handles.append(module.register_forward_hook(hook))
    try:
        with torch.inference_mode():
            model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if norms:
        taps["final_norm"] = Tap(norms[-1], "output")
    else:
        missing["final_norm"] = "no norm takes what leaves the last layer"
    return taps, missing


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to rounding in their dtype; a module may see batch and tokens flattened."""
    if a.shape[-1] != b.shape[-1] or a.numel() != b.numel():
        return False
    tolerance = 1e-4 if a.dtype == torch.float32 else 2e-2
    difference, scale = (a.float().flatten() - b.float().flatten()).norm(), b.float().norm()
    return bool(difference <= tolerance * scale)
