"""Columns that ranks lay side by side, back in the whole output's order."""

import pytest
import torch

from serve_app.engines.vllm.fragments import ColumnOrder


@pytest.mark.parametrize(
    ("parts", "shared", "ranks"),
    [
        ([8, 8], [1, 1], 2),  # gate and up
        ([16, 4, 4], [1, 1, 1], 4),  # each rank has heads of its own
        ([16, 4, 4], [1, 2, 2], 4),  # two keys' heads, each on two ranks
        ([8, 2, 3], [1, 4, 4], 4),  # one, on all; values are wider than keys
        ([6], [1], 1),
    ],
)
def test_the_whole_is_found_in_the_ranks_pieces(parts: list[int], shared: list[int], ranks: int) -> None:
    whole = torch.randn(5, sum(parts))
    columns = whole.split(parts, dim=1)
    pieces = [
        part.chunk(ranks // by, dim=1)[rank // by]
        for rank in range(ranks)
        for part, by in zip(columns, shared, strict=True)
    ]
    gathered = torch.cat(pieces, dim=1)
    widths = [part * by // ranks for part, by in zip(parts, shared, strict=True)]
    order = ColumnOrder.interleaved(widths, shared, ranks, torch.device("cpu"))
    assert torch.equal(whole[:, order.places], gathered)
    assert torch.equal(gathered[:, order.columns], whole)
