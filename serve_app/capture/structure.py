"""A model's hook points, and the resolution of a request's hook points into taps.

`resolver` creates a `ModelStructure` once per model. `ModelStructure.resolve` then serves every request from it, without the
model. It rejects a hook point that the model does not have, by name, before anything is generated.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from typing_extensions import TypedDict

from roentgen.contract import LAYER_HOOK_POINTS, MODEL_HOOK_POINTS, ActivationRequest, stored_key
from roentgen.model_names import suggest
from serve_app.errors import RequestError

Side = Literal["input", "output"]


class CaptureRequestError(RequestError):
    """A request asks for a layer, hook point or savepoint that the model does not have; `param` is the field."""

    def __init__(self, param: str, message: str, code: str | None = None) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param
        self.code = code


@dataclass(frozen=True)
class Tap:
    """A location to read: a module's path from the root, its input or output, and which of the tensors there.

    `plus` is the index of another tensor there to add, where a model passes the residual stream in two parts. `run` selects
    one of the module's runs in a forward, counted from 0, for a module that runs several times; None for one that runs once.
    """

    module: str
    side: Side
    index: int = 0
    plus: int | None = None
    run: int | None = None

    def __str__(self) -> str:
        """Format the location: `model.layers.0.mlp.output`, or `….router.output[1]` for a second tensor."""
        if self.plus is not None:
            return f"{self.module}.{self.side}[{self.index}] + [{self.plus}]"
        where = f"{self.module}.{self.side}" + (f"[{self.index}]" if self.index else "")
        return where if self.run is None else f"{where} (run {self.run + 1} of the module in a forward)"


class StructureRecord(TypedDict):
    """A model's layers and hook points as JSON: the location of each hook point, and why others are missing."""

    model_name: str
    model_type: str
    architecture: str
    num_layers: int
    layer_access_pattern: str
    pre_attention_path: str | None
    pre_mlp_path: str | None
    d_model: int
    hook_points: dict[str, str]
    hook_point_layers: dict[str, dict[str, list[int]]]
    missing: dict[str, str]
    verified_on: str
    savepoints: dict[str, str]


@dataclass(frozen=True)
class ModelStructure:
    """A model's hook points, resolved and verified."""

    model_name: str
    """The served name."""
    model_type: str
    """Transformers' `config.model_type`."""
    architecture: str
    """The model's class."""
    num_layers: int
    """Decoder layers."""
    d_model: int
    """Width of the residual stream."""
    layers_path: str
    """Path of the decoder layers' ModuleList."""
    taps: dict[str, Tap]
    """Per stored key of a canonical hook point, its tap."""
    missing: dict[str, str]
    """Why a hook point is missing: per hook point if no layer has it (`resid_mid`), per stored key if only some layers have it
    (`layers.0.router`, in a mixture of experts whose first layer is dense)."""
    module_paths: frozenset[str] = field(repr=False)
    """Every module's path, for requests that name one."""
    verified_on: str = "weights"
    """"weights", or the model that was used in their place."""
    savepoints: dict[str, Tap] = field(default_factory=dict)
    """Taps that have names of their own, given when the model was loaded."""
    fused: dict[str, str] = field(default_factory=dict)
    """Per name of a module that is fused with others in this implementation, the module that computes it."""
    split: frozenset[str] = field(default=frozenset(), repr=False)
    """Locations, `path.side`, that are sharded: each GPU has only some columns of a row."""
    tapped: frozenset[str] | None = field(default=None, repr=False)
    """The only locations, `path.side`, that the engine reads; None if it reads all."""
    untapped: str = ""
    """Why it reads no others, and how to change that."""

    def with_savepoints(self, savepoints: dict[str, Tap]) -> "ModelStructure":
        """Return the same structure with these savepoints.

        Raises:
            CaptureRequestError: naming the first savepoint whose module the model does not have.
        """
        for name, tap in savepoints.items():
            if tap.module not in self.module_paths:
                message = f"{name}: {self.model_name} has no module {tap.module!r}"
                raise CaptureRequestError("savepoints", message, "savepoint_not_found")
        return replace(self, savepoints=savepoints)

    def resolve(self, request: ActivationRequest) -> dict[str, Tap]:
        """Resolve a request into taps, per stored key, in the order of the request.

        A module path is relative to a layer ("mlp.gate_proj.output", read in each requested layer) or absolute
        (`model.norm.output`, read once). A savepoint is read once. If a path or a savepoint is a canonical hook point, it is
        stored under the canonical key.

        Raises:
            CaptureRequestError: naming what the model does not have, and what it has.
        """
        layers = self._layers(request)
        # A path names a module and a side, which is the first tensor there, whatever is added to it.
        canonical = {replace(tap, plus=None): (key, tap) for key, tap in reversed(self.taps.items())}
        found: dict[str, Tap] = {}
        for name in request.hook_points:
            if name in LAYER_HOOK_POINTS or name in MODEL_HOOK_POINTS:
                found |= self._canonical(name, layers, everywhere=request.layers == "all")
            elif name in self.savepoints:
                key, tap = canonical.get(self.savepoints[name], (name, self.savepoints[name]))
                found[key] = tap
            else:
                paths = self._module_path(name, layers, everywhere=request.layers == "all")
                found |= dict(canonical.get(tap, (key, tap)) for key, tap in paths.items())
        for key, tap in found.items():
            if self.tapped is not None and f"{tap.module}.{tap.side}" not in self.tapped:
                raise CaptureRequestError("activations.hook_points", f"{key}: {self.untapped}")
            if f"{tap.module}.{tap.side}" in self.split:
                way_out = (
                    "the input of the module after it is gathered (ask for that module's .input)"
                    if self.tapped is None
                    else "a server started with --eager gathers the inputs and outputs of linear layers"
                )
                raise CaptureRequestError(
                    "activations.hook_points",
                    f"{key} is sharded: each GPU has only some columns of {tap}; {way_out}",
                )
        return found

    def _layers(self, request: ActivationRequest) -> list[int]:
        if request.layers == "all":
            return list(range(self.num_layers))
        check_layers(request.layers, self.num_layers, self.model_name)
        return list(dict.fromkeys(layer % self.num_layers for layer in request.layers))

    def _canonical(self, name: str, layers: list[int], *, everywhere: bool) -> dict[str, Tap]:
        """Return a canonical hook point's taps; for `layers: "all"`, those of the layers that have it."""
        if name in self.missing:
            raise CaptureRequestError(
                "activations.hook_points", f"{self.model_name} has no {name}: {self.missing[name]}"
            )
        keys = [stored_key(name)] if name in MODEL_HOOK_POINTS else [stored_key(name, i) for i in layers]
        absent = next((key for key in keys if key in self.missing), None)
        if absent is not None and not everywhere:
            having = [i for i in range(self.num_layers) if stored_key(name, i) in self.taps]
            raise CaptureRequestError(
                "activations.layers",
                f"{self.model_name} has no {absent}: {self.missing[absent]}; {name} is in layers {ranges(having)}",
            )
        return {key: self.taps[key] for key in keys if key in self.taps}

    def _module_path(self, name: str, layers: list[int], *, everywhere: bool) -> dict[str, Tap]:
        """Return a module path's taps; for `layers: "all"`, those of the layers that have the module."""
        path, _, side = name.rpartition(".")
        reads: Side = "input" if side == "input" else "output"
        if side in ("input", "output") and path in self.module_paths:
            return {name: Tap(path, reads)}
        inside = {layer: f"{self.layers_path}.{layer}.{path}" for layer in layers}
        absent = [
            layer for layer in layers if side not in ("input", "output") or inside[layer] not in self.module_paths
        ]
        fused = next((part for part in path.split(".") if part in self.fused), None)
        if absent and fused is not None:
            raise CaptureRequestError(
                "activations.hook_points",
                f"{name!r} is not a hook point of {self.model_name} as it is served here: the engine computes {fused} "
                f"together with others in {self.fused[fused]}",
            )
        if absent and not (everywhere and len(absent) < len(layers)):
            allowed = ", ".join(h for h in (*LAYER_HOOK_POINTS, *MODEL_HOOK_POINTS) if h not in self.missing)
            raise CaptureRequestError(
                "activations.hook_points",
                f"{name!r} is not a hook point of {self.model_name}; it has {allowed}, and any module path ending in "
                f".input or .output, absolute or inside {self.layers_path}.{absent[0]}",
            )
        return {stored_key(name, layer): Tap(inside[layer], reads) for layer in layers if layer not in absent}

    def locations(self, name: str) -> dict[str, list[int]]:
        """Return a hook point's locations: per path, with `{i}` for the layer number, the layers that have it there."""
        found: dict[str, list[int]] = {}
        for layer in range(self.num_layers):
            tap = self.taps.get(stored_key(name, layer))
            if tap is not None:
                inside = str(tap).removeprefix(f"{self.layers_path}.{layer}.")
                found.setdefault(f"{self.layers_path}.{{i}}.{inside}", []).append(layer)
        return found

    def absences(self, name: str) -> dict[str, list[int]]:
        """Return why a hook point is missing: per reason, the layers that lack it."""
        everywhere = self.missing.get(name)
        if everywhere is not None:
            return {everywhere: list(range(self.num_layers))}
        found: dict[str, list[int]] = {}
        for layer in range(self.num_layers):
            reason = self.missing.get(stored_key(name, layer))
            if reason is not None:
                found.setdefault(reason, []).append(layer)
        return found

    def record(self) -> StructureRecord:
        """Return the structure in the format of `layer_analysis_results.json`, extended.

        `hook_points` has each hook point at the first layer that has it; `hook_point_layers` has all layers.
        """
        locations = {name: found for name in LAYER_HOOK_POINTS if (found := self.locations(name))}
        first = {name: next(iter(found.items())) for name, found in locations.items()}
        shared = {name: str(tap) for name in MODEL_HOOK_POINTS if (tap := self.taps.get(name))}
        before = {name: path.rpartition(".")[0] for name, (path, _) in first.items()}
        return {
            "model_name": self.model_name,
            "model_type": self.model_type,
            "architecture": self.architecture,
            "num_layers": self.num_layers,
            "layer_access_pattern": f"{self.layers_path}[i]",
            "pre_attention_path": before.get("ln_attn"),
            "pre_mlp_path": before.get("ln_mlp"),
            "d_model": self.d_model,
            "hook_points": {name: path.format(i=layers[0]) for name, (path, layers) in first.items()} | shared,
            "hook_point_layers": locations,
            "missing": self.missing,
            "verified_on": self.verified_on,
            "savepoints": {name: str(tap) for name, tap in self.savepoints.items()},
        }


def check_layers(layers: tuple[int, ...] | Literal["all"], num_layers: int, model_name: str) -> None:
    """Reject layers that a model with `num_layers` layers does not have.

    Raises:
        CaptureRequestError: naming the first of them.
    """
    for layer in () if layers == "all" else layers:
        if not -num_layers <= layer < num_layers:
            raise CaptureRequestError(
                "activations.layers",
                f'{layer} is out of range; {model_name} has layers 0–{num_layers - 1} (or "all")',
            )


def check_hook_points(names: Iterable[str]) -> None:
    """Reject names that are neither hook points nor module paths with a side; valid only for models without savepoints.

    Raises:
        CaptureRequestError: naming the first of them.
    """
    known = (*LAYER_HOOK_POINTS, *MODEL_HOOK_POINTS)
    for name in names:
        if name not in known and not name.endswith((".input", ".output")):
            raise CaptureRequestError(
                "activations.hook_points",
                f"{name!r} is not a hook point; allowed are {', '.join(known)}, and any module path ending in .input or .output"
                f"{suggest(name, known)}",
            )


def ranges(layers: list[int]) -> str:
    """Format layer numbers as ranges: `0–2, 5, 7–9`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
