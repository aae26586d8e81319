"""Decides one decoder layer's hook points from what its modules took and gave in a forward.

With x what enters the layer and y what leaves it:

1. Attention is the module whose class or name says so. What it adds, a, is the output of a norm fed by it, its own, or that
   of a module inside it (where attention adds the stream to its output by itself, as in Bloom).
2. If a later module is fed x + a, that input is `resid_mid` and the block is sequential. Otherwise, if x + a + m = y for
   another module's output m, the block is parallel and has no `resid_mid`.
3. `mlp_out` is the later output m with resid_mid + m = y.
4. `ln_attn` and `ln_mlp` are the norms between the stream and attention, and between the stream and the MLP.
5. `router` is the module that projects to the number of experts.

Where a block scales what it adds (Granite), x + c·a still verifies `resid_mid`; but no module's output is what is added, so
`attn_out` is missing, and its reason gives c. A layer without attention (a state-space one) is decided in the same way from
whatever mixes its tokens, which has no canonical name.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from roentgen.contract import LAYER_HOOK_POINTS
from serve_app.capture.equations import is_projection, same, share
from serve_app.capture.structure import Tap
from serve_app.capture.watching import LayerRun, ModuleCall

Found = dict[str, Tap | str]
"""Per canonical hook point: where it is, or the reason why it is nowhere."""

PARALLEL = "its block adds attention and MLP to the stream in parallel"
NO_MLP = "what the MLP adds was not found, so neither was the norm before it"


def resolve_block(layer_run: LayerRun, grid: torch.Size, n_experts: int | None) -> Found:
    """Decide every canonical hook point of a layer.

    Args:
        layer_run: its record of one forward.
        grid: batch and tokens of that forward.
        n_experts: the configuration's number of experts, None if it has none.
    """
    x, y = layer_run.input, layer_run.output
    if not (_has_rows(x, grid) and _has_rows(y, grid)):
        reason = f"its layers pass on {list(y.shape)} for {list(grid)} tokens, which is not a row per token"
        return dict.fromkeys(LAYER_HOOK_POINTS, reason)
    calls = [v for v in layer_run.calls if _has_rows(v.input, grid) and _has_rows(v.output, grid)]
    calls = [v for v in calls if v.output.is_floating_point()]
    attention = next((v for v in calls if v.is_attention), None)
    mixer = attention or next((v for v in calls if not v.is_norm), None)

    found: Found = {"resid_pre": Tap(layer_run.path, "input"), "resid_post": Tap(layer_run.path, "output")}
    if mixer is None:
        return dict.fromkeys(LAYER_HOOK_POINTS, "no module inside its layers gives a row per token") | found
    found |= _contributions(x, y, calls, mixer, layer_run.path)
    norm = next((v for v in calls if v.is_norm and same(v.input, x) and same(v.output, mixer.input)), None)
    found["ln_attn"] = Tap(norm.path, "output") if norm else "no norm takes the stream and gives what attention takes"
    if attention is None:
        kind = type(mixer.module).__name__
        found |= dict.fromkeys(("attn_out", "ln_attn"), f"no attention: its layer mixes tokens with {kind}")
    found["router"] = _router(layer_run.calls, attention, n_experts, layer_run.path)
    return found


def _contributions(x: Tensor, y: Tensor, calls: list[ModuleCall], mixer: ModuleCall, layer: str) -> Found:
    """Decide what attention and the MLP add to the stream, and the norm before the MLP."""
    start = calls.index(mixer)
    inside = [v for v in calls if v.inside(mixer)]
    others = [v for v in calls if v is not mixer and v not in inside and not mixer.inside(v)]
    later = [v for v in others if calls.index(v) > start]
    candidates = [v for v in later if v.is_norm and same(v.input, mixer.output)] + [mixer, *inside]

    sums = ((fed, added, share(fed.input, [x], added.output)) for added in candidates for fed in later)
    middle = _best(sums)
    if middle is not None:
        fed, added, factor = middle
        mlp = _best((v, v, share(y, [fed.input], v.output)) for v in later[later.index(fed) :])
        norms = (v for v in later if v.is_norm and same(v.input, fed.input))
        norm = next((n for n in norms if any(same(v.input, n.output) for v in later if v is not n)), None)
        return {
            "resid_mid": Tap(fed.path, "input"),
            "attn_out": _addition(added, factor, layer),
            "mlp_out": _addition(mlp[0], mlp[2], layer) if mlp else _leaving(y, later),
            "ln_mlp": _norm_of_mlp(norm) if mlp else NO_MLP,
        }
    for added in candidates:
        for mlp_call in others:
            if share(y, [x, added.output], mlp_call.output) == share(y, [x, mlp_call.output], added.output) == 1.0:
                norms = (v for v in others if v.is_norm and same(v.input, x) and same(v.output, mlp_call.input))
                norm = next(norms, None)
                return {
                    "resid_mid": PARALLEL if norm or same(mlp_call.input, x) else "no module is given it",
                    "attn_out": Tap(added.path, "output"),
                    "mlp_out": Tap(mlp_call.path, "output"),
                    "ln_mlp": _norm_of_mlp(norm),
                }
    for added in candidates:
        if share(y, [x], added.output) == 1.0:
            reason = f"its block adds one thing to the stream, the output of {_inside(added, layer)}"
            return {"attn_out": Tap(added.path, "output")} | dict.fromkeys(("resid_mid", "mlp_out", "ln_mlp"), reason)
    lost = "no module's output adds up to the stream after attention"
    return {"resid_mid": lost, "attn_out": lost, "mlp_out": _leaving(y, later), "ln_mlp": NO_MLP}


def _best(sums: Iterable[tuple[ModuleCall, ModuleCall, float | None]]) -> tuple[ModuleCall, ModuleCall, float] | None:
    """Return the first sum whose part is added as it is, else the first whose part is scaled."""
    scaled = None
    for fed, added, factor in sums:
        if factor == 1.0:
            return fed, added, factor
        if factor is not None and scaled is None:
            scaled = fed, added, factor
    return scaled


def _addition(call: ModuleCall, factor: float, layer: str) -> Tap | str:
    if factor == 1.0:
        return Tap(call.path, "output")
    return f"its block adds {factor:.4g} × the output of {_inside(call, layer)}, which no module gives"


def _norm_of_mlp(norm: ModuleCall | None) -> Tap | str:
    return Tap(norm.path, "output") if norm else "no norm takes the stream and gives what the MLP takes"


def _leaving(y: Tensor, later: list[ModuleCall]) -> str:
    """Say why nothing that was added gives the stream leaving the block."""
    if any(v.is_norm and same(v.output, y) for v in later):
        return "its block normalises the stream itself, after the MLP's contribution is added"
    return "no module's output adds up to the stream leaving the block"


def _inside(call: ModuleCall, layer: str) -> str:
    return call.path.removeprefix(f"{layer}.")


def _router(calls: list[ModuleCall], attention: ModuleCall | None, n_experts: int | None, layer: str) -> Tap | str:
    """Decide where the router's logits are: the outermost projection to the number of experts, outside attention."""
    if n_experts is None:
        return "not a mixture of experts"
    own = [v for v in calls if attention is None or not (v is attention or v.inside(attention))]
    logits = [v for v in own if v.output.shape[-1] == n_experts and is_projection(v.output, v.input, v.module)]
    outermost = min((v.path.count(".") for v in logits), default=0)
    logits = [
        v for v in logits if v.path.count(".") == outermost
    ]  # an expert may happen to be as wide as there are experts
    if len(logits) == 1:
        return Tap(logits[0].path, "output")
    if logits:
        return f"several modules project to its {n_experts} experts: {', '.join(_inside(v, layer) for v in logits)}"
    for v in own:
        for place, other in enumerate(v.other_outputs, start=1):
            if other.shape[-1] == n_experts and is_projection(other, v.input, v.module):
                return Tap(v.path, "output", place)
    if any("expert" in v.path or "router" in v.path for v in own):
        return f"no module gives the linear projection to its {n_experts} experts"
    return "its MLP is dense, not a mixture of experts"


def _has_rows(value: Tensor, grid: torch.Size) -> bool:
    """Whether a value has a row per token: batch and tokens as they are, or flattened."""
    return value.shape[:2] == grid or value.shape[:1] == (grid.numel(),)
