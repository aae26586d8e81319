"""A model's compiled decoding step: loaded beside the model, compared with it, and run in its place.

A compiled step passes the outputs of some modules to observers, as the model wrapped by nnsight does (`capture.observer`), and
observers may add to them. If a step's observers tap anything else, the model itself runs the step. Before a graph is used, it
runs a small batch that the model runs too. If its values differ from the model's, the graph is not used.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from roentgen.contract import stored_key
from serve_app.capture.observer import StepObserver, Subscription
from serve_app.capture.structure import ModelStructure, Tap
from serve_app.engines.transformers.compiled.compilation import GRAPHS, PARTS
from serve_app.engines.transformers.compiled.graph import NotCompilableError, parts_of
from serve_app.engines.transformers.compiled.operations import StepBindings, bind, library_file
from serve_app.engines.transformers.compiled.operations import load as load_operations
from serve_app.engines.transformers.kv_cache import SlotRows, slots_of
from serve_app.engines.transformers.model_cache import ForwardInputs
from serve_app.engines.transformers.packed_weights import PackedLinear

log = logging.getLogger(__name__)

OBSERVED_HOOK_POINTS = ("resid_post", "ln_attn", "ln_mlp")
"""Hook points that a graph exposes, of every layer. Each costs a little, even without observers."""

LARGEST_ERROR = {torch.float32: 1e-3}
HALF_ERROR = 0.05
"""The largest difference from the model's own values, relative to their norm, that rounding explains: the model rounds after
every operation, and a graph after every fused loop. Dtypes that are not in `LARGEST_ERROR` use `HALF_ERROR`."""

PROMPT_LENGTHS = (9, 5, 14)
"""Lengths of the prompts that a graph is checked with."""


def observed_modules_of(structure: ModelStructure) -> list[str]:
    """Return the paths of the modules whose outputs a graph exposes."""
    keys = [stored_key(name, layer) for layer in range(structure.num_layers) for name in OBSERVED_HOOK_POINTS]
    taps = [structure.taps[key] for key in keys if key in structure.taps]
    return list(dict.fromkeys(tap.module for tap in taps if tap == Tap(tap.module, "output")))


@dataclass(frozen=True)
class CompiledStep:
    """A step's graphs, for one row and for more, and the objects they refer to."""

    graphs: dict[bool, Any]
    """Per whether it is for one row, the graph."""
    linears: tuple[PackedLinear, ...]
    observed_modules: dict[str, int]
    """Paths of the modules whose outputs are exposed, with their indices."""

    @classmethod
    def load(cls, folder: Path, model: PreTrainedModel, observed_modules: Sequence[str]) -> "CompiledStep":
        """Load the graphs compiled for a model. They use the model's weights in place.

        Args:
            folder: contains the graphs.
            model: with packed weights.
            observed_modules: paths of the modules whose outputs are exposed.

        Raises:
            NotCompilableError: if the graphs belong to another model, or need something that this model does not have.
        """
        parts = parts_of(model, observed_modules)
        found = json.loads((folder / PARTS).read_text())
        if found != json.loads(json.dumps(parts.__dict__)):
            raise NotCompilableError("the graphs are another model's")
        linears = [model.get_submodule(path) for path, _ in parts.linears]
        state = {f"model.{name}": value for name, value in model.named_parameters(remove_duplicate=False)}
        state |= {f"model.{name}": value for name, value in model.named_buffers(remove_duplicate=False)}
        multiplied = {f"model.{path}.{name}" for path, _ in parts.linears for name in ("weight", "bias")}
        weights = {f"model.{name}" for name, _ in model.named_parameters()} - multiplied
        load_operations(library_file())
        graphs = {}
        for one_row, name in GRAPHS.items():
            graph = torch._inductor.aoti_load_package(str(folder / name), run_single_threaded=True)
            names = graph.get_constant_fqns()
            # Small constants become part of the code, and the process that compiles does not have the values of weights.
            if lost := sorted(weights.difference(names)) + [name for name in names if name not in state]:
                raise NotCompilableError(f"the graph does not take {lost[0]} from the model")
            graph.load_constants(
                {name: state[name].detach() for name in names}, check_full_update=True, user_managed=True
            )
            graphs[one_row] = graph
        packed = tuple(one for one in linears if isinstance(one, PackedLinear))
        if len(packed) < len(linears):
            raise NotCompilableError("not all of its weights are packed")
        return cls(graphs, packed, {path: number for number, path in enumerate(observed_modules)})

    def exposes(self, observers: Sequence[StepObserver]) -> bool:
        """Whether the graph exposes every tap of these observers."""
        return all(
            tap.module in self.observed_modules and tap == Tap(tap.module, "output")
            for observer in observers
            for tap in observer.taps.values()
        )

    def run(self, inputs: ForwardInputs, observers: Sequence[StepObserver]) -> Float[Tensor, "rows 1 vocab"]:
        """Run a step and pass its values to observers; returns the logits.

        Args:
            inputs: one new token per row; its cache is written to.
            observers: receive values; observers of one module run in this order. All their taps are exposed.
        """
        subscriptions: dict[int, list[Subscription]] = {}
        for observer in observers:
            for key, tap in observer.taps.items():
                subscriptions.setdefault(self.observed_modules[tap.module], []).append(
                    Subscription(observer, key, 0, None)
                )
        callbacks = {index: _notify_all(found) for index, found in subscriptions.items()}
        graph = self.graphs[len(inputs.tokens) == 1]
        linears = [(one.packed, one.bias) for one in self.linears]
        with bind(StepBindings(linears, slots_of(inputs.cache), len(self.observed_modules), callbacks)):
            # The graph assumes the memory layout of the inputs that it was compiled with.
            logits: Tensor = graph(*(one.contiguous() for one in (inputs.tokens, inputs.mask, inputs.positions)))
        return logits

    @torch.inference_mode()
    def check(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        """Compare steps with the model's own, at every exposed module.

        Raises:
            NotCompilableError: if one differs.
        """
        limit = LARGEST_ERROR.get(dtype, HALF_ERROR)
        for lengths in (PROMPT_LENGTHS, PROMPT_LENGTHS[:1]):
            try:
                mine, theirs = (_values(self, model, lengths, compiled=compiled) for compiled in (True, False))
            except RuntimeError as failure:
                raise NotCompilableError(str(failure).strip().split("\n")[0]) from failure
            for name, value in theirs.items():
                error = float((mine[name] - value).norm() / value.norm())
                if not error <= limit:
                    raise NotCompilableError(f"{name or 'the logits'} of {len(lengths)} rows differ by {error:.2g}")


def _notify_all(subscriptions: list[Subscription]) -> Any:
    def notify(value: Tensor) -> None:
        for subscription in subscriptions:
            subscription.notify(value)

    return notify


class _ValueRecorder:
    """An observer that copies the values it receives."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.taps = {path: Tap(path, "output") for path in paths}
        self.values: dict[str, Tensor] = {}

    def __call__(self, key: str, value: Tensor) -> None:
        self.values[key] = value.to(torch.float32, copy=True)

    def fail(self, key: str, reason: str) -> None:
        raise NotCompilableError(reason)


def _values(
    compiled_step: CompiledStep, model: PreTrainedModel, lengths: Sequence[int], *, compiled: bool
) -> dict[str, Tensor]:
    """Return a step's value at every exposed module, and its logits under "", after prompts of some lengths."""
    generator = torch.Generator().manual_seed(0)
    size, width = model.get_input_embeddings().weight.shape[0], max(lengths)
    padding = [width - length for length in lengths]
    tokens = torch.randint(0, size, (len(lengths), width + 1), generator=generator)
    columns = torch.arange(width)
    mask = (columns >= torch.tensor(padding)[:, None]).long()
    positions = (columns - torch.tensor(padding)[:, None]).clamp(min=0)
    rows = SlotRows()
    cache = rows.new()
    model.forward(
        input_ids=tokens[:, :-1], attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    )
    rows.add(cache, list(range(len(lengths))), padding, width)
    mask, positions = rows.step_inputs()
    seen = _ValueRecorder(list(compiled_step.observed_modules))
    if compiled:
        logits = compiled_step.run(ForwardInputs(tokens[:, -1:], mask, positions, rows.cache), [seen])
    else:
        handles = [
            model.get_submodule(path).register_forward_hook(
                lambda _, args, output, path=path: seen(path, output[0] if isinstance(output, tuple) else output)
            )
            for path in compiled_step.observed_modules
        ]
        try:
            logits = model.forward(
                input_ids=tokens[:, -1:],
                attention_mask=mask,
                position_ids=positions,
                past_key_values=rows.cache,
                use_cache=True,
            ).logits
        finally:
            for handle in handles:
                handle.remove()
    return {**seen.values, "": logits[:, -1].float()}
