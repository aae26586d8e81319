"""Finds canonical hook points in vLLM's modules, and reads values there.

vLLM implements every architecture itself, with fused modules. A norm adds the last contribution to the stream before it
normalizes, so layers pass the stream on as a pair `(hidden, residual)` whose sum is the stream. q, k and v are one projection.
So a structure that was resolved on transformers' modules does not hold here, and the stream is read as a sum wherever it is
passed:

    resid_pre   the layer's input             resid_mid   the input of the norm before the MLP
    resid_post  the layer's output            attn_out, mlp_out, ln_attn, ln_mlp   the outputs of those modules

Names yield candidates only (`candidates`). They are verified on the rows of a real request, captured like any other
(`verify`): the stream must be the sum of its contributions, and each norm must take the stream and feed the module after it. A
hook point that does not hold is missing, with the reason, and requests for it are rejected.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from roentgen.contract import (
    DEFAULT_TAPS,
    DEFAULT_TAPS_NAME,
    LAYER_HOOK_POINTS,
    MODEL_HOOK_POINTS,
    split_key,
    stored_key,
)
from serve_app.capture.equations import same, share
from serve_app.capture.structure import Tap
from serve_app.capture.watching import tensors

ATTENTION = ("self_attn", "attn", "attention", "self_attention")
MLP = ("mlp", "block_sparse_moe", "feed_forward", "ffn")
NORM_OF_ATTENTION = ("input_layernorm", "ln_1", "norm_1", "attention_norm", "pre_attention_layernorm")
NORM_OF_MLP = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2", "norm_2", "ffn_norm")
AFTER_ATTENTION = ("post_attention_layernorm",)
AFTER_MLP = ("post_feedforward_layernorm",)
ROUTERS = ("mlp.gate", "mlp.router", "block_sparse_moe.gate", "feed_forward.router")
EMBEDDINGS = ("model.embed_tokens", "transformer.wte", "gpt_neox.embed_in", "model.decoder.embed_tokens")
FINAL_NORMS = ("model.norm", "transformer.ln_f", "gpt_neox.final_layer_norm", "model.decoder.final_layer_norm")
"""Names of these modules in vLLM's models, the likeliest first."""

CHECK = "check."
"""Prefix of the keys of values that are read for the equations only."""


@dataclass(frozen=True)
class Modules:
    """A worker's description of its loaded model."""

    paths: frozenset[str]
    """The path of every module."""
    layers_path: str
    """Path of the list of decoder layers."""
    num_layers: int
    """Number of decoder layers."""
    fused: dict[str, str]
    """Per name of a fused module, the module that contains it."""
    architecture: str
    """The model's class."""


@dataclass(frozen=True)
class Verified:
    """One rank's results of the request that hook points are verified on."""

    wrong: dict[str, str]
    """Per stored key, why the hook point does not hold."""
    norms: dict[str, list[float]]
    """Per requested location, the norm of every row, if it had rows."""


def describe_modules(paths: Iterable[str], packed: Mapping[str, list[str]], architecture: str) -> Modules:
    """Find a model's decoder layers: the longest list of numbered modules that is inside no other.

    Args:
        paths: path of every module.
        packed: vLLM's `packed_modules_mapping`.
        architecture: the model's class.

    Raises:
        ValueError: if there are none.
    """
    paths = frozenset(path for path in paths if path)
    counts: dict[str, int] = {}
    for path in paths:
        parent, _, number = path.rpartition(".")
        if number.isdigit() and not any(part.isdigit() for part in parent.split(".")):
            counts[parent] = counts.get(parent, 0) + 1
    if not counts:
        raise ValueError(f"{architecture} has no list of decoder layers")
    layers_path = max(counts, key=lambda parent: counts[parent])
    fused = {name: whole for whole, parts in packed.items() for name in parts if name != whole}
    return Modules(paths, layers_path, counts[layers_path], fused, architecture)


def terms(value: Any, tap: Tap) -> tuple[Float[Tensor, "..."], ...]:
    """Return the one or two tensors whose sum a tap reads of a module's input or output; to change the sum, change the first.

    Integer tensors, such as the positions that layers and attention take first, do not count. The first layer has no residual
    yet: if there is no second tensor, the first is the whole stream.

    Raises:
        TypeError: if there is no such tensor.
    """
    floats = list(_floats(value))
    if tap.index >= len(floats):
        raise TypeError(f"no tensor {tap.index} in a {type(value).__name__}")
    first = floats[tap.index]
    return (first,) if tap.plus is None or tap.plus >= len(floats) else (first, floats[tap.plus])


def _floats(value: Any) -> Iterable[Tensor]:
    return (tensor for tensor in tensors(value) if tensor.is_floating_point())


def candidates(modules: Modules) -> tuple[dict[str, Tap], dict[str, Tap]]:
    """Return the likely taps of canonical hook points, by module names; and the other taps that their verification needs."""
    taps: dict[str, Tap] = {}
    checks: dict[str, Tap] = {}
    for layer in range(modules.num_layers):
        path = f"{modules.layers_path}.{layer}"

        def find(names: tuple[str, ...], path: str = path) -> str | None:
            return next((found for name in names if (found := f"{path}.{name}") in modules.paths), None)

        attention, mlp = find(ATTENTION), find(MLP)
        before, between = find(NORM_OF_ATTENTION), find(NORM_OF_MLP)
        sandwiched = f"{path}.{NORM_OF_MLP[0]}" in modules.paths
        after_attention = find(AFTER_ATTENTION) if sandwiched else None
        found = {
            "resid_pre": Tap(path, "input", plus=1),
            "resid_mid": Tap(between, "input", plus=1) if between else None,
            "resid_post": Tap(path, "output", plus=1),
            "attn_out": _output(after_attention or attention),
            "mlp_out": _output(find(AFTER_MLP) or mlp),
            "ln_attn": _output(before),
            "ln_mlp": _output(between),
            "router": _output(find(ROUTERS)),
        }
        taps |= {stored_key(name, layer): tap for name, tap in found.items() if tap is not None}
        read_too = {
            "ln_attn": Tap(before, "input", plus=1) if before else None,
            "attention": Tap(attention, "input") if attention else None,
            "mlp": Tap(mlp, "input") if mlp else None,
        }
        checks |= {CHECK + stored_key(name, layer): tap for name, tap in read_too.items() if tap is not None}
    embedding = next((path for path in EMBEDDINGS if path in modules.paths), None)
    final = next((path for path in FINAL_NORMS if path in modules.paths), None)
    if embedding:
        taps["embed"] = Tap(embedding, "output")
    if final:
        taps["final_norm"] = Tap(final, "output")
        checks[CHECK + "final_norm"] = Tap(final, "input", plus=1)
    return taps, checks


def declared_taps(declared: Iterable[str], modules: Modules) -> tuple[dict[str, Tap], list[str]]:
    """Return the taps that a configuration declares, by stored key, and the names that match nothing in this model.

    Args:
        declared: hook points (`resid_post`, of all layers), stored keys (`layers.12.resid_post`), or module paths that end in
            .input or .output: from the root, inside each layer, or inside one layer (`layers.12.mlp.output`). `*` matches any
            part of a path. `default` stands for those of `DEFAULT_TAPS` that the model has.
        modules: the model's modules.
    """
    known, _ = candidates(modules)
    canonical = {(tap.module, tap.side): key for key, tap in reversed(known.items())}
    found: dict[str, Tap] = {}
    unknown: list[str] = []
    for name in declared:
        if name == DEFAULT_TAPS_NAME:
            found |= declared_taps(DEFAULT_TAPS, modules)[0]
            continue
        taps = {key: tap for key, tap in known.items() if name in (key, split_key(key)[0])}
        path, _, side = name.rpartition(".")
        if not taps and side in ("input", "output"):
            for module in _matching(path, modules):
                location = tap_at(f"{module}.{side}")
                key = canonical.get((module, location.side), f"{module}.{side}")
                taps[key] = known.get(key, location)
        found |= taps
        if not taps:
            unknown.append(name)
    return found, unknown


def _matching(path: str, modules: Modules) -> list[str]:
    """Return the modules that a declared path matches."""
    layers = modules.layers_path
    spellings = (path, f"{layers}.*.{path}", f"{layers}.{path.removeprefix('layers.')}")
    patterns = [re.compile(re.escape(one).replace(r"\*", r"[^.]+")) for one in spellings]
    return sorted(module for module in modules.paths if any(pattern.fullmatch(module) for pattern in patterns))


def tap_at(location: str) -> Tap:
    """Return the tap at a location: a module's path and a side."""
    path, _, side = location.rpartition(".")
    return Tap(path, "input" if side == "input" else "output")


def split_locations(ranks: Sequence[Verified]) -> frozenset[str]:
    """Return the sharded locations: those where the ranks' rows differ. Elsewhere all ranks have nearly equal rows."""
    first = ranks[0].norms
    return frozenset(
        location
        for location, norms in first.items()
        if any(not _alike(norms, other.norms.get(location, [])) for other in ranks[1:])
    )


def _alike(a: list[float], b: list[float]) -> bool:
    return len(a) == len(b) and all(math.isclose(x, y, rel_tol=1e-3, abs_tol=1e-9) for x, y in zip(a, b, strict=True))


def _output(path: str | None) -> Tap | None:
    return Tap(path, "output") if path else None


def verify(rows: Mapping[str, Float[Tensor, "rows width"]], n_layers: int, n_experts: int | None) -> dict[str, str]:
    """Verify hook points on the rows of a request; returns the reason per stored key that does not hold.

    Args:
        rows: per key of `candidates` with a row per token, its rows.
        n_layers: number of decoder layers.
        n_experts: the configuration's number of experts; None if it has none.
    """
    wrong: dict[str, str] = {}
    for layer in range(n_layers):
        found = {name: rows.get(stored_key(name, layer)) for name in LAYER_HOOK_POINTS}
        for name, reason in _check_layer(
            found,
            {name: rows.get(CHECK + stored_key(name, layer)) for name in ("ln_attn", "attention", "mlp")},
            n_experts,
        ).items():
            wrong[stored_key(name, layer)] = reason
        following = rows.get(stored_key("resid_pre", layer + 1))
        if following is not None and not _equal(found["resid_post"], following):
            wrong[stored_key("resid_post", layer)] = "the layer's output is not the next layer's input"
    last = rows.get(stored_key("resid_post", n_layers - 1))
    if "final_norm" in rows and not _equal(rows.get(CHECK + "final_norm"), last):
        wrong["final_norm"] = "no normalization layer was found after the last layer"
    for name in MODEL_HOOK_POINTS:
        if name not in rows:
            wrong[name] = "no module of vLLM's model outputs it"
    return wrong


def _check_layer(
    found: Mapping[str, Tensor | None], read_too: Mapping[str, Tensor | None], n_experts: int | None
) -> dict[str, str]:
    """Verify one layer's hook points; returns reasons by hook point."""
    wrong = {name: "no module of vLLM's model outputs it" for name, values in found.items() if values is None}
    if not _sum(found["resid_mid"], found["resid_pre"], found["attn_out"]):
        reason = (
            "in vLLM's modules the residual stream after attention is not the layer's input plus attention's output"
        )
        wrong |= dict.fromkeys(("resid_mid", "attn_out"), reason)
    if not _sum(found["resid_post"], found["resid_mid"], found["mlp_out"]):
        reason = "in vLLM's modules the layer's output is not the stream before the MLP plus the MLP's output"
        wrong |= {"mlp_out": reason}
    if not (_equal(read_too["ln_attn"], found["resid_pre"]) and _equal(found["ln_attn"], read_too["attention"])):
        wrong["ln_attn"] = "no normalization layer was found between the residual stream and attention"
    if not _equal(found["ln_mlp"], read_too["mlp"]):
        wrong["ln_mlp"] = "no normalization layer was found between the residual stream and the MLP"
    router = found["router"]
    if n_experts is None:
        wrong["router"] = "not a mixture of experts"
    elif router is not None and router.shape[-1] != n_experts:
        wrong["router"] = f"no module outputs logits for its {n_experts} experts"
    return wrong


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and same(a, b)


def _sum(total: Tensor | None, a: Tensor | None, b: Tensor | None) -> bool:
    return total is not None and a is not None and b is not None and share(total, [a], b) == 1.0


def missing(taps: Mapping[str, Tap], wrong: Mapping[str, str], n_layers: int) -> tuple[dict[str, Tap], dict[str, str]]:
    """Return the hook points that hold, and the reasons for the others: by name if no layer has it, else by stored key."""
    reasons: dict[str, str] = {name: wrong[name] for name in MODEL_HOOK_POINTS if name in wrong}
    for name in LAYER_HOOK_POINTS:
        absent = {key: reason for key, reason in wrong.items() if split_key(key) == (name, split_key(key)[1])}
        absent = {key: reason for key, reason in absent.items() if split_key(key)[1] is not None}
        reasons |= absent if len(absent) < n_layers else {name: "; ".join(dict.fromkeys(absent.values()))}
    return {key: tap for key, tap in taps.items() if key not in wrong}, reasons
