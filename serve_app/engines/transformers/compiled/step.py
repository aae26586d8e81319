"""A model's compiled decoding step: loaded beside the model, compared with it, and run in its place.

A step shows the outputs that `places` names to visitors, as the model observed by nnsight does (`capture.observer`), and they
may add to them. One whose visitors look elsewhere is the model's. Before a graph is used it runs a small batch that the model
runs too: one whose values are others is not used.
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
from serve_app.capture.observer import Visit, Visitor
from serve_app.capture.structure import ModelStructure, Tap
from serve_app.engines.transformers.compiled.compilation import GRAPHS, PARTS
from serve_app.engines.transformers.compiled.graph import NotCompilableError, parts_of
from serve_app.engines.transformers.compiled.operations import Bound, bound
from serve_app.engines.transformers.kv_cache import SlotRows
from serve_app.engines.transformers.model_cache import ForwardInputs
from serve_app.engines.transformers.packed_weights import PackedLinear

log = logging.getLogger(__name__)

SHOWN = ("resid_post", "ln_attn", "ln_mlp")
"""Hook points whose places a graph shows, of every layer: each costs a little, also when nobody looks."""

LARGEST_ERROR = {torch.float32: 1e-3}
HALF_ERROR = 0.05
"""The largest difference from the model's own values, relative to their norm, that rounding explains: the model rounds after
every operation, and a graph after every loop. Other dtypes than those of `LARGEST_ERROR` have `HALF_ERROR`."""

TRIED = (9, 5, 14)
"""Tokens of the prompts that a graph is tried with."""


def shown_places(structure: ModelStructure) -> list[str]:
    """Return the paths of the modules whose outputs a graph shows."""
    keys = [stored_key(name, layer) for layer in range(structure.num_layers) for name in SHOWN]
    taps = [structure.taps[key] for key in keys if key in structure.taps]
    return list(dict.fromkeys(tap.module for tap in taps if tap == Tap(tap.module, "output")))


@dataclass(frozen=True)
class CompiledStep:
    """A step's graphs, for one row and for more, and what they refer to."""

    graphs: dict[bool, Any]
    """By whether it is for one row."""
    linears: tuple[PackedLinear, ...]
    places: dict[str, int]
    """Paths of the modules that are shown, and their numbers."""

    @classmethod
    def load(cls, folder: Path, model: PreTrainedModel, places: Sequence[str]) -> "CompiledStep":
        """Load what was compiled for a model. Its weights are used where they lie.

        Args:
            folder: with the graphs.
            model: with packed weights.
            places: paths of the modules that are shown.

        Raises:
            NotCompilableError: if the graphs are another model's, or need something that this model does not have.
        """
        parts = parts_of(model, places)
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
            # Few numbers become part of the code, and the process that compiles does not know those of weights.
            if lost := sorted(weights.difference(names)) + [name for name in names if name not in state]:
                raise NotCompilableError(f"the graph does not take {lost[0]} from the model")
            graph.load_constants(
                {name: state[name].detach() for name in names}, check_full_update=True, user_managed=True
            )
            graphs[one_row] = graph
        packed = tuple(one for one in linears if isinstance(one, PackedLinear))
        if len(packed) < len(linears):
            raise NotCompilableError("not all of its weights are packed")
        return cls(graphs, packed, {path: number for number, path in enumerate(places)})

    def shows(self, visitors: Sequence[Visitor]) -> bool:
        """Whether all places where visitors look are shown."""
        return all(
            tap.module in self.places and tap == Tap(tap.module, "output")
            for visitor in visitors
            for tap in visitor.taps.values()
        )

    def run(self, inputs: ForwardInputs, visitors: Sequence[Visitor]) -> Float[Tensor, "rows 1 vocab"]:
        """Run a step and show its values; returns the logits.

        Args:
            step: one new token per row; its cache is written to.
            visitors: who looks, at one place in this order; all places are shown.
        """
        visits: dict[int, list[Visit]] = {}
        for visitor in visitors:
            for key, tap in visitor.taps.items():
                visits.setdefault(self.places[tap.module], []).append(Visit(visitor, key, 0, None))
        looks = {place: _looking(found) for place, found in visits.items()}
        graph = self.graphs[len(inputs.tokens) == 1]
        linears = [(one.packed, one.bias) for one in self.linears]
        with bound(Bound(linears, inputs.cache.layers, looks)):
            # It reads its arguments as they lay when it was made.
            logits: Tensor = graph(*(one.contiguous() for one in (inputs.tokens, inputs.mask, inputs.positions)))
        return logits

    @torch.inference_mode()
    def check(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        """Compare steps with the model's own, at every place that is shown.

        Raises:
            NotCompilableError: if one is another.
        """
        limit = LARGEST_ERROR.get(dtype, HALF_ERROR)
        for lengths in (TRIED, TRIED[:1]):
            try:
                mine, theirs = (_values(self, model, lengths, compiled=compiled) for compiled in (True, False))
            except RuntimeError as failure:
                raise NotCompilableError(str(failure).strip().split("\n")[0]) from failure
            for name, value in theirs.items():
                error = float((mine[name] - value).norm() / value.norm())
                if not error <= limit:
                    raise NotCompilableError(f"{name or 'the logits'} of {len(lengths)} rows are off by {error:.2g}")


def _looking(visits: list[Visit]) -> Any:
    def look(value: Tensor) -> None:
        for visit in visits:
            visit.show(value)

    return look


class _Seen:
    """A visitor that copies what it is shown."""

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
    """Return what a step gives at every place, and as "" its logits; after prompts of some lengths, by a graph or the model."""
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
    seen = _Seen(list(compiled_step.places))
    if compiled:
        logits = compiled_step.run(ForwardInputs(tokens[:, -1:], mask, positions, rows.cache), [seen])
    else:
        handles = [
            model.get_submodule(path).register_forward_hook(
                lambda _, args, output, path=path: seen(path, output[0] if isinstance(output, tuple) else output)
            )
            for path in compiled_step.places
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
