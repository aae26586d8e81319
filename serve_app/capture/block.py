"""Decides the hook points of one decoder layer from its modules' inputs and outputs in a forward.

    x = the layer's input, y = its output, a = attention's contribution, m = the MLP's

    sequential   x ──► +a ──► resid_mid ──► +m ──► y     a later module takes x + a
    parallel     x ──► +a +m ──► y                       x + a + m = y; there is no resid_mid
    single       x ──► +a ──► y                          x + a = y; there is no MLP

1. Attention is the module whose class or name says so. Its contribution a is the output of a norm after it, its own output, or
   the output of a module inside it (where attention adds the stream to its output itself, as in Bloom).
2. If a later module takes x + a, that input is `resid_mid` and the block is sequential. Otherwise, if x + a + m = y for
   another module's output m, the block is parallel.
3. `mlp_out` is the later output m with resid_mid + m = y.
4. `ln_attn` and `ln_mlp` are the norms between the residual stream and attention, and between the stream and the MLP.
5. `router` is the module that projects to the number of experts.

Where a block scales its contributions (Granite), x + c·a still verifies `resid_mid`. But no module outputs c·a, so `attn_out`
is missing and the reason names c. A layer without attention (a state-space layer) is decided in the same way from the module
that mixes its tokens, which has no canonical name.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from roentgen.contract import LAYER_HOOK_POINTS
from serve_app.capture.equations import is_projection, same, share
from serve_app.capture.structure import Tap
from serve_app.capture.watching import LayerRun, ModuleCall

Found = dict[str, Tap | str]
"""Per canonical hook point: its tap, or the reason why it is missing."""

PARALLEL = "its block adds attention and MLP to the residual stream in parallel"
NO_MLP = "the MLP's contribution was not found, so neither was the normalization layer before it"


def resolve_block(layer_run: LayerRun, batch_shape: torch.Size, n_experts: int | None) -> Found:
    """Decide every canonical hook point of a layer.

    Args:
        layer_run: the layer's record of one forward.
        batch_shape: batch size and number of tokens of that forward.
        n_experts: the configuration's number of experts; None if it has none.
    """
    x, y = layer_run.input, layer_run.output
    if not (_has_rows(x, batch_shape) and _has_rows(y, batch_shape)):
        reason = f"its layers pass on {list(y.shape)} for {list(batch_shape)} tokens, which is not a row per token"
        return dict.fromkeys(LAYER_HOOK_POINTS, reason)
    calls = [v for v in layer_run.calls if _has_rows(v.input, batch_shape) and _has_rows(v.output, batch_shape)]
    calls = [v for v in calls if v.output.is_floating_point()]
    attention = next((v for v in calls if v.is_attention), None)
    mixer = attention or next((v for v in calls if not v.is_norm), None)

    found: Found = {"resid_pre": Tap(layer_run.path, "input"), "resid_post": Tap(layer_run.path, "output")}
    if mixer is None:
        return dict.fromkeys(LAYER_HOOK_POINTS, "no module inside its layers outputs a row per token") | found
    block = _BlockSums.of(x, y, calls, mixer, layer_run.path)
    found |= block.sequential() or block.parallel() or block.single() or block.unknown()
    norm = next((v for v in calls if v.is_norm and same(v.input, x) and same(v.output, mixer.input)), None)
    found["ln_attn"] = _norm(norm, "attention")
    if attention is None:
        kind = type(mixer.module).__name__
        found |= dict.fromkeys(("attn_out", "ln_attn"), f"no attention: its layer mixes tokens with {kind}")
    found["router"] = _router(layer_run.calls, attention, n_experts, layer_run.path)
    return found


def _contributions(resid_mid: Tap | str, attn_out: Tap | str, mlp_out: Tap | str, ln_mlp: Tap | str) -> Found:
    return {"resid_mid": resid_mid, "attn_out": attn_out, "mlp_out": mlp_out, "ln_mlp": ln_mlp}


@dataclass(frozen=True)
class _BlockSums:
    """What a layer adds to the residual stream; each method tries one shape of a block, and returns None if it is another."""

    x: Tensor
    """The layer's input."""
    y: Tensor
    """The layer's output."""
    layer: str
    """The layer's path."""
    candidates: list[ModuleCall]
    """Modules that may output attention's contribution, the likeliest first."""
    others: list[ModuleCall]
    """Modules beside attention: neither inside nor around it."""
    later: list[ModuleCall]
    """Those of `others` that run after attention."""

    @classmethod
    def of(cls, x: Tensor, y: Tensor, calls: list[ModuleCall], mixer: ModuleCall, layer: str) -> "_BlockSums":
        """Sort a layer's modules by their place relative to attention, or to what mixes tokens instead."""
        start = calls.index(mixer)
        inside = [v for v in calls if v.inside(mixer)]
        others = [v for v in calls if v is not mixer and v not in inside and not mixer.inside(v)]
        later = [v for v in others if calls.index(v) > start]
        norms = [v for v in later if v.is_norm and same(v.input, mixer.output)]
        return cls(x, y, layer, [*norms, mixer, *inside], others, later)

    def sequential(self) -> Found | None:
        """A later module takes x + a."""
        middle = _best(
            (fed, added, share(fed.input, [self.x], added.output)) for added in self.candidates for fed in self.later
        )
        if middle is None:
            return None
        fed, added, factor = middle
        mlp = _best((v, v, share(self.y, [fed.input], v.output)) for v in self.later[self.later.index(fed) :])
        norms = (v for v in self.later if v.is_norm and same(v.input, fed.input))
        norm = next((n for n in norms if any(same(v.input, n.output) for v in self.later if v is not n)), None)
        return _contributions(
            resid_mid=Tap(fed.path, "input"),
            attn_out=self._scaled(added, factor),
            mlp_out=self._scaled(mlp[0], mlp[2]) if mlp else self._no_mlp_out(),
            ln_mlp=_norm(norm, "the MLP") if mlp else NO_MLP,
        )

    def parallel(self) -> Found | None:
        """Two modules' outputs a and m have x + a + m = y."""
        for added in self.candidates:
            for mlp in self.others:
                if (
                    share(self.y, [self.x, added.output], mlp.output)
                    == share(self.y, [self.x, mlp.output], added.output)
                    == 1.0
                ):
                    norms = (
                        v for v in self.others if v.is_norm and same(v.input, self.x) and same(v.output, mlp.input)
                    )
                    norm = next(norms, None)
                    return _contributions(
                        resid_mid=PARALLEL if norm or same(mlp.input, self.x) else "no module takes it as its input",
                        attn_out=Tap(added.path, "output"),
                        mlp_out=Tap(mlp.path, "output"),
                        ln_mlp=_norm(norm, "the MLP"),
                    )
        return None

    def single(self) -> Found | None:
        """One module's output a has x + a = y."""
        for added in self.candidates:
            if share(self.y, [self.x], added.output) == 1.0:
                path = _inside(added, self.layer)
                reason = f"its block makes one contribution to the residual stream, the output of {path}"
                return _contributions(reason, Tap(added.path, "output"), reason, reason)
        return None

    def unknown(self) -> Found:
        """No equation holds."""
        reason = "no module's output accounts for the residual stream after attention"
        return _contributions(reason, reason, self._no_mlp_out(), NO_MLP)

    def _scaled(self, call: ModuleCall, factor: float) -> Tap | str:
        if factor == 1.0:
            return Tap(call.path, "output")
        return f"its block adds {factor:.4g} × the output of {_inside(call, self.layer)}, which no module outputs"

    def _no_mlp_out(self) -> str:
        if any(v.is_norm and same(v.output, self.y) for v in self.later):
            return "its block normalizes the residual stream itself, after the MLP's contribution is added"
        return "no module's output accounts for the residual stream leaving the block"


def _best(sums: Iterable[tuple[ModuleCall, ModuleCall, float | None]]) -> tuple[ModuleCall, ModuleCall, float] | None:
    """Return the first sum whose part is added unscaled, else the first whose part is scaled."""
    scaled = None
    for fed, added, factor in sums:
        if factor == 1.0:
            return fed, added, factor
        if factor is not None and scaled is None:
            scaled = fed, added, factor
    return scaled


def _norm(norm: ModuleCall | None, after: str) -> Tap | str:
    if norm is None:
        return f"no normalization layer was found between the residual stream and {after}"
    return Tap(norm.path, "output")


def _inside(call: ModuleCall, layer: str) -> str:
    return call.path.removeprefix(f"{layer}.")


def _router(calls: list[ModuleCall], attention: ModuleCall | None, n_experts: int | None, layer: str) -> Tap | str:
    """Find the router's logits: the outermost projection to the number of experts, outside attention."""
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
        return f"no module outputs the linear projection to its {n_experts} experts"
    return "its MLP is dense, not a mixture of experts"


def _has_rows(value: Tensor, batch_shape: torch.Size) -> bool:
    """Whether a value has a row per token; batch and token axes may be separate or flattened."""
    return value.shape[:2] == batch_shape or value.shape[:1] == (batch_shape.numel(),)
