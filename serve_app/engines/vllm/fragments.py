"""Gathers values that tensor parallelism has sharded, with columns in the model's own order.

nnsight gathers a sharded value by concatenating the ranks' columns. Where vLLM has fused several projections into one, each
rank has a part of each of them, so the result is q₀ k₀ v₀ q₁ k₁ v₁, and a KV head that several ranks share is there several
times. This module reorders the columns to q k v, as on one GPU. So a probe trained on one GPU also works on several.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from nnsight.modeling.vllm.fragments import VLLMFragments
from nnsight.util import apply
from torch import Tensor, nn
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear


class OrderedFragments(VLLMFragments):
    """nnsight's fragments of an engine, with the columns of fused projections in the model's order."""

    def __init__(self, found: VLLMFragments) -> None:
        """Take over the sharded locations that nnsight has found.

        Args:
            found: nnsight's own fragments, of a wrapped model.
        """
        super().__init__()
        self.enabled, self.rules = found.enabled, found.rules
        self._column_orders = {
            location: order for location, (module, _) in self.rules.items() if (order := column_order(module))
        }

    def whole(self, location: str, value: Any) -> tuple[Any, Callable[[Any], Any]]:
        """Return the gathered value, and a function that shards a gathered value again."""
        gathered, cut = super().whole(location, value)
        order = self._column_orders.get(location)
        if order is None:
            return gathered, cut
        return (
            apply(gathered, lambda columns: columns[..., order.columns], Tensor),
            lambda whole: cut(apply(whole, lambda columns: columns[..., order.places], Tensor)),
        )


@dataclass(frozen=True)
class ColumnOrder:
    """The order of the ranks' concatenated columns in the whole value."""

    places: Int[Tensor, "gathered"]
    """Per gathered column, its column in the whole value; a column that several ranks have is there several times."""
    columns: Int[Tensor, "whole"]
    """Per column of the whole value, a gathered column that has it."""

    @classmethod
    def interleaved(cls, widths: list[int], shared: list[int], ranks: int, device: torch.device) -> "ColumnOrder":
        """Return the order of fused parts, of which each rank has one piece.

        Args:
            widths: per part, the width of a rank's piece.
            shared: per part, the number of consecutive ranks that hold each piece.
            ranks: number of ranks.
            device: device of the values.
        """
        starts = [0]
        for width, by in zip(widths, shared, strict=True):
            starts.append(starts[-1] + width * ranks // by)
        pieces = [
            torch.arange(width) + start + rank // by * width
            for rank in range(ranks)
            for width, by, start in zip(widths, shared, starts[:-1], strict=True)
        ]
        places = torch.cat(pieces)
        columns = torch.empty(starts[-1], dtype=torch.long)
        columns[places] = torch.arange(len(places))
        return cls(places.to(device), columns.to(device))


def column_order(module: nn.Module) -> ColumnOrder | None:
    """Return the order of a sharded module's gathered output; None if concatenation is the model's own order."""
    if isinstance(module, QKVParallelLinear):
        kv_heads, replicas = module.num_kv_heads, module.num_kv_head_replicas
        widths = [module.num_heads * module.head_size, kv_heads * module.head_size, kv_heads * module.v_head_size]
        shared = [1, replicas, replicas]
    elif isinstance(module, MergedColumnParallelLinear):
        widths = [size // module.tp_size for size in module.output_sizes]
        shared = [1] * len(widths)
    else:
        return None
    return ColumnOrder.interleaved(widths, shared, module.tp_size, next(module.parameters()).device)
