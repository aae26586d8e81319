"""Records the steps in which a model's hook points are verified."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from serve_app.capture.batch_layout import PackedBatch
from serve_app.capture.structure import Tap


def sum_of(found: Sequence[Tensor]) -> Tensor:
    """Return the sum of a value's terms (`hook_points.terms`)."""
    return functools.reduce(torch.add, found)


class RowRecorder:
    """Records all rows that its taps read; an observer for the verification of hook points."""

    def __init__(self, taps: dict[str, Tap]) -> None:
        self.taps = taps
        self.layout = PackedBatch([])
        self._parts: dict[str, list[Tensor]] = {}

    def __call__(self, key: str, *found: Tensor) -> None:
        """Record a value's rows, if it has a row per token."""
        flat = self.layout.flat(sum_of(found))
        kept = self._kept(flat) if flat is not None else None
        if kept is not None:
            self._parts.setdefault(key, []).append(kept)

    def seen(self) -> dict[str, Tensor]:
        """Return, per key, the recorded rows."""
        return {key: torch.cat(parts) for key, parts in self._parts.items()}

    def _kept(self, flat: Tensor) -> Tensor | None:
        return flat.to("cpu", copy=True) if flat.ndim == 2 else None


class NormRecorder(RowRecorder):
    """Records the rows' norms only: enough to find out whether ranks have the same rows or shards of them."""

    def _kept(self, flat: Tensor) -> Tensor | None:
        norms: Tensor = flat.reshape(len(flat), -1).double().norm(dim=1).cpu()
        return norms
