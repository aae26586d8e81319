"""What a model has to capture: its hook points, and a request's hook points turned into places to read.

`resolver` makes a `ModelStructure` once per model; `ModelStructure.resolve` then serves every request from it, without
touching the model. What the model does not have is refused here, by name, before anything is generated.
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
    """A request asks for something the model does not have; `param` is "activations.layers" or "activations.hook_points"."""

    def __init__(self, param: str, message: str, code: str | None = None) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param
        self.code = code


@dataclass(frozen=True)
class Tap:
    """A location to read: a module's path from the root, its input or output, and which of the tensors there.

    `plus` is another tensor there that is to be added, where a model passes the residual stream in two parts. `run` is which
    of the module's runs in a forward is meant, counted from 0, of a module that runs several times; None of one that runs once.
    """

    module: str
    side: Side
    place: int = 0
    plus: int | None = None
    run: int | None = None

    def __str__(self) -> str:
        """Write the location as people do: `model.layers.0.mlp.output`, or `….router.output[1]` for a second tensor."""
        if self.plus is not None:
            return f"{self.module}.{self.side}[{self.place}] + [{self.plus}]"
        where = f"{self.module}.{self.side}" + (f"[{self.place}]" if self.place else "")
        return where if self.run is None else f"{where} (run {self.run + 1} of the module in a forward)"


class StructureRecord(TypedDict):
    """A model's layers and hook points as JSON: where each is, which are missing and why."""

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
    """Per stored key of a canonical hook point, where it is."""
    missing: dict[str, str]
    """Why a hook point is missing: per name where no layer has it (`resid_mid`), per stored key where only some layers have
    it (`layers.0.router`, in a mixture of experts whose first layer is dense)."""
    module_paths: frozenset[str] = field(repr=False)
    """Every module's path, for requests that name one."""
    verified_on: str = "weights"
    """"weights", or what stood in for them."""
    savepoints: dict[str, Tap] = field(default_factory=dict)
    """Places that whoever loaded the model has named."""
    fused: dict[str, str] = field(default_factory=dict)
    """Modules that other implementations have and this one does not, by name, and which module does their work."""
    split: frozenset[str] = field(default=frozenset(), repr=False)
    """Places, `path.side`, at which each of the GPUs that hold the model has a part of every row only."""
    tapped: frozenset[str] | None = field(default=None, repr=False)
    """The only places, `path.side`, that the engine reads; None if it reads all."""
    untapped: str = ""
    """Why it reads no others, and what to do."""

    def with_savepoints(self, savepoints: dict[str, Tap]) -> "ModelStructure":
        """Return the same structure with places of these names.

        Raises:
            CaptureRequestError: naming the first whose module the model does not have.
        """
        for name, tap in savepoints.items():
            if tap.module not in self.module_paths:
                message = f"{name}: {self.model_name} has no module {tap.module!r}"
                raise CaptureRequestError("savepoints", message, "savepoint_not_found")
        return replace(self, savepoints=savepoints)

    def resolve(self, request: ActivationRequest) -> dict[str, Tap]:
        """Turn a request into taps, per stored key, in the order asked for.

        A module path may be relative to a layer ("mlp.gate_proj.output", read in each layer asked for) or absolute
        (`model.norm.output`, read once), and a savepoint's name is read once too. Where either is a canonical hook point it is
        stored under the canonical key.

        Raises:
            CaptureRequestError: naming what the model does not have, and what it has.
        """
        layers = self._layers(request)
        # By what a path can say: a module and its side, so the first tensor there, whatever is added to it.
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
                    "what the module after it takes is put together (ask for that one's .input)"
                    if self.tapped is None
                    else "a server started with --eager puts together what linear layers take and give"
                )
                raise CaptureRequestError(
                    "activations.hook_points",
                    f"{key} is in parts: the model is split, and each GPU has some columns of {tap} only; {way_out}",
                )
        return found

    def _layers(self, request: ActivationRequest) -> list[int]:
        if request.layers == "all":
            return list(range(self.num_layers))
        check_layers(request.layers, self.num_layers, self.model_name)
        return list(dict.fromkeys(layer % self.num_layers for layer in request.layers))

    def _canonical(self, name: str, layers: list[int], *, everywhere: bool) -> dict[str, Tap]:
        """Return a canonical hook point's taps; asked for everywhere, those of the layers that have it."""
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
        """Return the taps of a module path; asked for everywhere, those of the layers that have the module."""
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

    def places(self, name: str) -> dict[str, list[int]]:
        """Return where a layer's hook point is: per path, with `{i}` for the layer's number, the layers it holds for."""
        found: dict[str, list[int]] = {}
        for layer in range(self.num_layers):
            tap = self.taps.get(stored_key(name, layer))
            if tap is not None:
                inside = str(tap).removeprefix(f"{self.layers_path}.{layer}.")
                found.setdefault(f"{self.layers_path}.{{i}}.{inside}", []).append(layer)
        return found

    def absences(self, name: str) -> dict[str, list[int]]:
        """Return why a layer's hook point is missing: per reason, the layers it holds for."""
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
        """Return the structure as `layer_analysis_results.json` has it, extended.

        `hook_points` has a layer's hook points at the first layer that has them; `hook_point_layers` has all of them.
        """
        places = {name: found for name in LAYER_HOOK_POINTS if (found := self.places(name))}
        first = {name: next(iter(found.items())) for name, found in places.items()}
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
            "hook_point_layers": places,
            "missing": self.missing,
            "verified_on": self.verified_on,
            "savepoints": {name: str(tap) for name, tap in self.savepoints.items()},
        }


def check_layers(layers: tuple[int, ...] | Literal["all"], num_layers: int, model_name: str) -> None:
    """Refuse layers that a model with so many does not have.

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
    """Refuse names that no model without savepoints has: neither a hook point's nor a module path with its side.

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
    """Write layer numbers as people do: `0–2, 5, 7–9`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
