"""Finds a model's hook points by recording a forward, not by trusting module names.

Names mislead: in Gemma 2 `post_attention_layernorm` normalizes attention's output, and in Llama it is the norm before the MLP.
So the resolver runs one short forward with plain PyTorch hooks on every module of every decoder layer, and identifies modules
by their values (`block` has the equations of a layer). A hook point that satisfies no equation is reported as missing, with
the reason, and requests for it are rejected. It is never guessed.

The decoder layers are the longest `ModuleList` whose modules all run. `embed` is the output of the token embedding.
`final_norm` is the output of the norm whose input is the last layer's output.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from roentgen.contract import LAYER_HOOK_POINTS, stored_key
from serve_app.capture.block import Found, resolve_block
from serve_app.capture.equations import same
from serve_app.capture.structure import ModelStructure, Tap
from serve_app.capture.watching import LayerRun, first_tensor, watch
from serve_app.errors import RequestError

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Names of the number of experts in configurations."""

Layers = list[tuple[str, nn.Module]]


class ResolutionError(RequestError):
    """The model's decoder layers could not be found, or the model does not run on token ids alone."""

    code, param = "model_unsupported", "model_id"


def resolve_structure(model: PreTrainedModel, model_name: str) -> ModelStructure:
    """Find and verify a model's hook points with two short forwards.

    Raises:
        ResolutionError: if it has no list of decoder layers, or they do not pass a residual stream.
    """
    embedding = model.get_input_embeddings()
    # Two sequences of eight tokens, so that a row per token can be told from other layouts of batch and tokens.
    tokens = (torch.arange(16, device=embedding.weight.device) % embedding.weight.shape[0]).view(2, 8)
    layers_path, layers = _decoder_layers(model, tokens)
    n_experts = number_of_experts(model.config.get_text_config())
    blocks: dict[str, Found] = {}
    leaving: list[Tensor] = []

    def passed(layer_run: LayerRun) -> None:
        if layer_run.path in blocks:
            raise ResolutionError(f"{layer_run.path} runs more than once in a forward")
        blocks[layer_run.path] = resolve_block(layer_run, tokens.shape, n_experts)
        leaving[:] = [layer_run.output]

    embedded: list[nn.Module] = []
    counting = embedding.register_forward_pre_hook(lambda module, _: embedded.append(module))
    with _norms_around(model, layers_path) as norms, watch(layers, passed):
        try:
            _forward(model, tokens)
        finally:
            counting.remove()
    for path, _ in layers:
        if path not in blocks:
            raise ResolutionError(f"{path} does not pass on a residual stream of its own")
    taps, missing = _by_key([blocks[path] for path, _ in layers])
    if len(embedded) == 1:
        taps["embed"] = Tap(next(name for name, module in model.named_modules() if module is embedding), "output")
    else:
        missing["embed"] = f"the token embedding runs {len(embedded)} times in a forward"
    final = [place for place, (_, taken) in enumerate(norms) if same(taken, leaving[0])]
    if final:
        taps["final_norm"] = _norm_tap([path for path, _ in norms], final[-1])
    else:
        missing["final_norm"] = "no normalization layer was found after the last layer"
    return ModelStructure(
        model_name=model_name,
        model_type=model.config.model_type,
        architecture=type(model).__name__,
        num_layers=len(layers),
        d_model=leaving[0].shape[-1],
        layers_path=layers_path,
        taps=taps,
        missing=missing,
        module_paths=frozenset(name for name, _ in model.named_modules() if name),
        verified_on="weights",
    )


def number_of_experts(config: PretrainedConfig) -> int | None:
    """Return a configuration's number of experts, None if it has none."""
    places = (config, getattr(config, "ffn_config", None))  # DBRX describes its MLP in a configuration of its own
    return next((n for place in places for name in EXPERTS if (n := getattr(place, name, None))), None)


def _decoder_layers(model: PreTrainedModel, tokens: Int[Tensor, "batch tokens"]) -> tuple[str, Layers]:
    """Return the longest list whose modules all run and that is inside no other list: its path, and its modules by path."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    top = {name: m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    ran: set[nn.Module] = set()
    handles = [m.register_forward_pre_hook(lambda m, _: ran.add(m)) for layers in top.values() for m in layers]
    try:
        _forward(model, tokens)
    finally:
        for handle in handles:
            handle.remove()
    whole = [(name, layers) for name, layers in top.items() if ran.issuperset(layers)]
    if not whole:
        raise ResolutionError(f"{type(model).__name__} has no list of decoder layers that all run")
    path, layers = max(whole, key=lambda item: len(item[1]))
    return path, [(f"{path}.{index}", layer) for index, layer in enumerate(layers)]


@contextmanager
def _norms_around(model: nn.Module, layers_path: str) -> Iterator[list[tuple[str, Tensor]]]:
    """Record the input of each norm outside the layers, in the order they run."""
    taken: list[tuple[str, Tensor]] = []

    def hook(module: nn.Module, args: Any, kwargs: Any, *, path: str) -> None:
        taken.append((path, first_tensor((args, kwargs)).clone()))

    handles = [
        module.register_forward_pre_hook(partial(hook, path=name), with_kwargs=True)
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and not name.startswith(f"{layers_path}.")
    ]
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()


def _norm_tap(paths: list[str], place: int) -> Tap:
    """Return the tap of one of the norms that ran, given in order; some models run one norm several times."""
    path = paths[place]
    run = paths[:place].count(path) if paths.count(path) > 1 else None
    return Tap(path, "output", run=run)


def _forward(model: PreTrainedModel, tokens: Int[Tensor, "batch tokens"]) -> None:
    """Run a forward on token ids alone."""
    try:
        with torch.inference_mode():
            model(input_ids=tokens, use_cache=False)
    except ResolutionError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ResolutionError(
            f"{type(model).__name__} does not run on tokens alone ({type(error).__name__}: {reason})"
        ) from error


def _by_key(blocks: list[Found]) -> tuple[dict[str, Tap], dict[str, str]]:
    """Return the layers' taps by stored key, and the reasons for missing hook points.

    A reason's key is the hook point if no layer has it, else the stored key.
    """
    taps: dict[str, Tap] = {}
    missing: dict[str, str] = {}
    for name in LAYER_HOOK_POINTS:
        absent: dict[str, str] = {}
        for index, block in enumerate(blocks):
            found = block[name]
            if isinstance(found, Tap):
                taps[stored_key(name, index)] = found
            else:
                absent[stored_key(name, index)] = found
        missing |= absent if len(absent) < len(blocks) else {name: "; ".join(dict.fromkeys(absent.values()))}
    return taps, missing
