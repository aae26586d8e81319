"""Puts together what tensor parallelism has split, with columns in the model's own order.

nnsight gathers a split value by laying the ranks' columns side by side. Where vLLM has fused several projections into one, each
rank holds a piece of every one of them, so what that gives is q₀ k₀ v₀ q₁ k₁ v₁, and a key's head that several ranks share is
there several times. Here it is q k v, as it is on one GPU: a probe trained on one is a probe on the other.
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
    """nnsight's fragments of an engine, with fused projections in order."""

    def __init__(self, found: VLLMFragments) -> None:
        """Take over what nnsight has found to be split.

        Args:
            found: nnsight's own, of a model that has been wrapped.
        """
        super().__init__()
        self.enabled, self.rules = found.enabled, found.rules
        self._column_orders = {
            location: order for location, (module, _) in self.rules.items() if (order := column_order(module))
        }

    def whole(self, location: str, value: Any) -> tuple[Any, Callable[[Any], Any]]:
        """Return the whole of a value, and what cuts a whole back to this rank's piece."""
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
    """How the ranks' columns, side by side, lie in the whole."""

    places: Int[Tensor, "gathered"]
    """Per gathered column, its place in the whole; a column that several ranks have is there several times."""
    columns: Int[Tensor, "whole"]
    """Per place, a gathered column that has it."""

    @classmethod
    def interleaved(cls, widths: list[int], shared: list[int], ranks: int, device: torch.device) -> "ColumnOrder":
        """Return the order where each rank has one piece of every part.

        Args:
            widths: per part, of a rank's piece.
            shared: per part, by how many ranks in turn each piece is held.
            ranks: how many there are.
            device: where the values are.
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
    """Return the order of a split module's gathered output; None if side by side is the model's own."""
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
