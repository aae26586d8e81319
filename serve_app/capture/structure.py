"""What a model has to capture: its hook points, and a request's hook points turned into places to read.

`resolver` makes a `ModelStructure` once per model; `ModelStructure.resolve` then serves every request from it, without
touching the model. What the model does not have is refused here, by name, before anything is generated.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from roentgen.contract import LAYER_HOOK_POINTS, MODEL_HOOK_POINTS, ActivationRequest, stored_key

Side = Literal["input", "output"]


class CaptureRequestError(ValueError):
    """A request asks for something the model does not have.

    Attributes:
        param: the offending parameter, "activations.layers" or "activations.hook_points".
    """

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param


@dataclass(frozen=True)
class Tap:
    """A location to read: a module's path from the root, and its input or output."""

    module: str
    side: Side


@dataclass(frozen=True)
class ModelStructure:
    """A model's hook points, resolved and verified.

    Attributes:
        model_name: the served name.
        model_type: transformers' `config.model_type`.
        architecture: the model's class.
        num_layers: decoder layers.
        d_model: width of the residual stream.
        layers_path: path of the decoder layers' ModuleList.
        taps: per stored key of a canonical hook point, where it is.
        missing: per hook point that the model does not have everywhere, why.
        module_paths: every module's path, for requests that name one.
    """

    model_name: str
    model_type: str
    architecture: str
    num_layers: int
    d_model: int
    layers_path: str
    taps: dict[str, Tap]
    missing: dict[str, str]
    module_paths: frozenset[str] = field(repr=False)

    def resolve(self, request: ActivationRequest) -> dict[str, Tap]:
        """Turn a request into taps, per stored key, in the order asked for.

        A module path may be relative to a layer (`mlp.gate_proj.output`, read in each layer asked for) or absolute
        (`model.norm.output`, read once). Where it is a canonical hook point it is stored under the canonical key.

        Raises:
            CaptureRequestError: naming what the model does not have, and what it has.
        """
        layers = self._layers(request)
        canonical = {tap: key for key, tap in self.taps.items()}
        found: dict[str, Tap] = {}
        for name in request.hook_points:
            for key, tap in self._hook_point(name, layers):
                found[canonical.get(tap, key)] = tap
        return found

    def _layers(self, request: ActivationRequest) -> list[int]:
        if request.layers == "all":
            return list(range(self.num_layers))
        for layer in request.layers:
            if not -self.num_layers <= layer < self.num_layers:
                raise CaptureRequestError(
                    "activations.layers",
                    f'{layer} is out of range; {self.model_name} has layers 0–{self.num_layers - 1} (or "all")',
                )
        return list(dict.fromkeys(layer % self.num_layers for layer in request.layers))

    def _hook_point(self, name: str, layers: list[int]) -> Iterator[tuple[str, Tap]]:
        if name in LAYER_HOOK_POINTS or name in MODEL_HOOK_POINTS:
            if name in self.missing:
                raise CaptureRequestError(
                    "activations.hook_points", f"{self.model_name} has no {name}: {self.missing[name]}"
                )
            for key in [stored_key(name)] if name in MODEL_HOOK_POINTS else [stored_key(name, i) for i in layers]:
                yield key, self.taps[key]
            return
        path, _, side = name.rpartition(".")
        if side in ("input", "output") and path in self.module_paths:
            yield name, Tap(path, "input" if side == "input" else "output")
            return
        for layer in layers:
            inside = f"{self.layers_path}.{layer}.{path}"
            if side not in ("input", "output") or inside not in self.module_paths:
                allowed = ", ".join(h for h in (*LAYER_HOOK_POINTS, *MODEL_HOOK_POINTS) if h not in self.missing)
                raise CaptureRequestError(
                    "activations.hook_points",
                    f"{name!r} is not a hook point of {self.model_name}; it has {allowed}, and any module path ending in "
                    f".input or .output, absolute or inside {self.layers_path}.{layer}",
                )
            yield stored_key(name, layer), Tap(inside, "input" if side == "input" else "output")

    def record(self) -> dict[str, Any]:
        """Return the structure as `layer_analysis_results.json` has it, plus the canonical map of layer 0."""
        own = {name: self.taps[key] for name in LAYER_HOOK_POINTS if (key := stored_key(name, 0)) in self.taps}
        shared = {name: self.taps[name] for name in MODEL_HOOK_POINTS if name in self.taps}

        def template(name: str) -> str | None:
            tap = own.get(name)
            prefix = f"{self.layers_path}.0."
            return tap.module.replace(prefix, f"{self.layers_path}.{{i}}.") if tap else None

        return {
            "model_name": self.model_name,
            "model_type": self.model_type,
            "architecture": self.architecture,
            "num_layers": self.num_layers,
            "layer_access_pattern": f"{self.layers_path}[i]",
            "pre_attention_path": template("ln_attn"),
            "pre_mlp_path": template("ln_mlp"),
            "d_model": self.d_model,
            "hook_points": {name: f"{tap.module}.{tap.side}" for name, tap in {**own, **shared}.items()},
            "missing": self.missing,
        }
