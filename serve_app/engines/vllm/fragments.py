"""Puts together what tensor parallelism has split, with columns in the model's own order.

nnsight gathers a split value by laying the ranks' columns side by side. Where vLLM has fused several projections into one, each
rank holds a piece of every one of them, so what that gives is q₀ k₀ v₀ q₁ k₁ v₁, and a key's head that several ranks share is
there several times. Here it is q k v, as it is on one GPU: a probe trained on one is a probe on the other.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Int
from nnsight.modeling.vllm.fragments import VLLMFragments
from nnsight.util import apply
from torch import Tensor, nn
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear


class OrderedFragments(VLLMFragments):
    """nnsight's fragments of one engine, with fused projections in order."""

    def whole(self, location: str, value: Any) -> tuple[Any, Callable[[Any], Any]]:
        """Return the whole of a value, and what cuts a whole back to this rank's piece."""
        gathered, cut = super().whole(location, value)
        places = natural_places(self.rules[location][0])
        if places is None:
            return gathered, cut
        first = _first_at(places)
        return (
            apply(gathered, lambda tensor: tensor[..., first.to(tensor.device)], Tensor),
            lambda whole: cut(apply(whole, lambda tensor: tensor[..., places.to(tensor.device)], Tensor)),
        )


@cache
def natural_places(module: nn.Module) -> Int[Tensor, "gathered"] | None:
    """Return, per column of the ranks' outputs side by side, its place in the whole output; None if they are in order.

    Args:
        module: whose output is gathered.
    """
    ranks = getattr(module, "tp_size", 1)
    if isinstance(module, QKVParallelLinear):
        shared = module.num_kv_head_replicas
        widths = [module.num_heads * module.head_size, *(module.num_kv_heads * size for size in _kv_sizes(module))]
        return _interleaved(widths, [1, shared, shared], ranks)
    if isinstance(module, MergedColumnParallelLinear):
        return _interleaved([size // ranks for size in module.output_sizes], [1] * len(module.output_sizes), ranks)
    return None


def _kv_sizes(module: QKVParallelLinear) -> tuple[int, int]:
    return module.head_size, module.v_head_size


def _interleaved(widths: list[int], shared: list[int], ranks: int) -> Int[Tensor, "gathered"]:
    """Return the places of columns of which each rank has one piece of every part.

    Args:
        widths: per part, of a rank's piece.
        shared: per part, by how many ranks in turn each piece is held.
        ranks: how many there are.
    """
    starts = [0]
    for width, by in zip(widths, shared, strict=True):
        starts.append(starts[-1] + width * ranks // by)
    pieces = [
        torch.arange(width) + start + rank // by * width
        for rank in range(ranks)
        for width, by, start in zip(widths, shared, starts[:-1], strict=True)
    ]
    return torch.cat(pieces)


def _first_at(places: Int[Tensor, "gathered"]) -> Int[Tensor, "whole"]:
    """Return, per place, the first column that has it."""
    order = torch.argsort(places, stable=True)
    starts = torch.searchsorted(places[order], torch.arange(int(places.max()) + 1))
    return order[starts]
