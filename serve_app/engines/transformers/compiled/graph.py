"""Exports the graph of a decoding step: the model's own forward for one new token per row, with the engine's operations in it.

The exported code is the model's code in transformers, run on a model without weights. Linear layers call `linear`, attention
calls `attend`, and exposed modules call `observe` on their outputs. Masks and rotations are the model's own. A model whose
forward cannot be exported (BLOOM's biases need all columns of the keys) raises an error, and runs without a graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import AttentionInterface, Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from serve_app.engines.transformers.grouped_attention import OTHER_OPTIONS

ATTENTION = "roentgen_compiled"
MOST_ROWS = 4096
ROWS, COLUMNS = 16, 200
"""Shape of the example that a graph for several rows is exported with; inductor splits loops to suit it."""


class NotCompilableError(Exception):
    """A model's decoding step cannot be compiled; the message says why."""


@dataclass(frozen=True)
class GraphParts:
    """The parts of a model that a graph refers to by index. A graph can run any model with the same parts."""

    architecture: str
    """The model's class."""
    linears: tuple[tuple[str, int], ...]
    """Paths of the linear layers, and the number of outputs of each."""
    observed_modules: tuple[str, ...]
    """Paths of the modules whose outputs are exposed."""


def parts_of(model: nn.Module, observed_modules: Sequence[str]) -> GraphParts:
    """Return a model's parts.

    Args:
        model: with packed or plain linear layers.
        observed_modules: paths of the modules whose outputs are exposed.
    """
    linears = tuple((path, one.out_features) for path, one in model.named_modules() if isinstance(one, nn.Linear))
    return GraphParts(type(model).__name__, linears, tuple(observed_modules))


def export_step(model: PreTrainedModel, parts: GraphParts, *, one_row: bool) -> ExportedProgram:
    """Export a decoding step. The model cannot be used afterwards.

    Args:
        model: on a CPU; only the shapes of its weights matter.
        parts: its parts.
        one_row: whether the graph is for one row, or else for two and more.

    Raises:
        NotCompilableError: if it cannot be exported.
    """
    for number, (path, outputs) in enumerate(parts.linears):
        model.set_submodule(path, _Linear(number, outputs))
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.is_meta:
                setattr(module, name, nn.Parameter(torch.empty_like(weight, device="cpu"), requires_grad=False))
    for number, path in enumerate(parts.observed_modules):
        model.get_submodule(path).register_forward_hook(_observed(number))
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, eager_mask)  # computed once per step, as numbers to add
    model.set_attn_implementation(ATTENTION)
    rows = 1 if one_row else ROWS
    mask = torch.ones(rows, COLUMNS, dtype=torch.long)
    mask[:, :2] = 0
    example = (torch.zeros(rows, 1, dtype=torch.long), mask, torch.full((rows, 1), COLUMNS - 3))
    dynamic = {} if one_row else {0: Dim("rows", min=2, max=MOST_ROWS)}
    shapes = (dynamic, {**dynamic, 1: Dim("columns", min=2)}, dynamic)
    try:
        with torch.no_grad():
            return torch.export.export(DecodingStep(model), example, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise NotCompilableError(f"{parts.architecture} cannot be exported: {reason}") from error


class DecodingStep(nn.Module):
    """A model's forward for one new token per row, over a cache that the engine owns."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Wrap a model."""
        super().__init__()
        self.model = model
        self._layers = model.config.get_text_config().num_hidden_layers

    def forward(
        self, tokens: Int[Tensor, "rows 1"], mask: Int[Tensor, "rows columns"], positions: Int[Tensor, "rows 1"]
    ) -> Float[Tensor, "rows 1 vocab"]:
        """Return the logits after the new tokens; their column is the mask's last."""
        cache = Cache(layers=[_ExternalCacheLayer(mask.shape[1]) for _ in range(self._layers)])
        logits: Tensor = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits


class _Linear(nn.Module):
    """A linear layer whose weight the engine owns."""

    def __init__(self, number: int, outputs: int) -> None:
        super().__init__()
        self._number, self._outputs = number, outputs

    def forward(self, rows: Float[Tensor, "... width"]) -> Float[Tensor, "... outputs"]:
        output: Tensor = torch.ops.roentgen.linear(rows, self._number, self._outputs)
        return output


class _ExternalCacheLayer(CacheLayerMixin):
    """A cache layer that passes new keys and values on: attention writes them to the engine's cache."""

    is_sliding = False
    is_compileable = True

    def __init__(self, columns: int) -> None:
        super().__init__()
        self._columns = columns
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """There is nothing to make."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._columns, 0

    def get_seq_length(self) -> int:
        return self._columns - 1

    def get_max_length(self) -> int:
        return -1


def _attention(
    module: nn.Module,
    query: Float[Tensor, "rows heads 1 d"],
    key: Float[Tensor, "rows kv_heads 1 d"],
    value: Float[Tensor, "rows kv_heads 1 d_value"],
    attention_mask: Float[Tensor, "rows 1 1 columns"] | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "rows 1 heads d_value"], None]:
    """Compute attention through transformers' attention interface.

    Raises:
        NotCompilableError: if the model's attention takes more than a scale and a mask for all heads.
    """
    given = [name for name in OTHER_OPTIONS if options.get(name) is not None]
    if given or attention_mask is None or attention_mask.shape[1] != 1:
        raise NotCompilableError(f"its attention takes {', '.join(given) or 'no mask, or a mask per head'}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return torch.ops.roentgen.attend(query, key, value, attention_mask, module.layer_idx, scaling), None


def _observed(number: int) -> Any:
    def hook(module: nn.Module, args: object, output: Any) -> None:
        torch.ops.roentgen.observe(output[0] if isinstance(output, tuple) else output, number)

    return hook
