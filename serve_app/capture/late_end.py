"""What to collect of a request while it is not known where its completion ends, and what is kept of it once that is known.

A request may overrun: rows come that belong to no token of the completion but its last, or to none at all. Where a stop string
or a probe's score ends it, that is known only when the row behind the end is there. So what depends on where the end is (the
last row, the mean of all generated ones) is decided afterwards, and rows behind it are dropped.
"""

from dataclasses import replace

import numpy as np
import torch

from roentgen.contract import Positions
from serve_app.capture.rows import CapturedRows, CapturePlan


class RowsMissingError(Exception):
    """Other rows were collected than there should be; the message counts them."""


def collecting_plan(plan: CapturePlan, n_prompt: int) -> CapturePlan:
    """Return what to collect for a plan while it is not known where the completion ends.

    Args:
        plan: what is to be kept in the end.
        n_prompt: tokens in the prompt.
    """
    match plan.positions.policy:
        case "last":
            return replace(plan, positions=Positions("all"), dtype="model", first=max(plan.first, n_prompt - 1))
        case "mean_generated":
            return replace(plan, positions=Positions("generated"), dtype="model")
        case _:
            return plan


def settled(rows: CapturedRows, plan: CapturePlan, n_prompt: int, n_rows: int) -> CapturedRows:
    """Return what a plan keeps of what `collecting_plan` collected, once the end is known.

    Args:
        rows: collected, perhaps beyond the end.
        plan: what is to be kept.
        n_prompt: tokens in the prompt.
        n_rows: of a full capture.

    Raises:
        RowsMissingError: if there are others than there should be.
    """
    wanted = plan.kept(n_prompt, 0, n_rows)
    if plan.positions.policy == "mean_prompt":
        _check(rows, [-1] * bool(wanted))
        return rows
    inside = np.isin(rows.position, np.arange(n_rows))
    if plan.positions.policy == "last":
        inside &= rows.position == n_rows - 1
    if not inside.all():
        kept = torch.from_numpy(np.flatnonzero(inside))
        rows = CapturedRows({key: values[kept] for key, values in rows.tensors.items()}, rows.position[inside])
    _check(rows, list(wanted))
    tensors = rows.tensors
    if plan.positions.policy == "mean_generated":
        kept_as = {key: values.dtype if plan.dtype == "model" else torch.float32 for key, values in tensors.items()}
        tensors = {
            key: values.float().mean(0, keepdim=True).to(kept_as[key]) if len(values) else values
            for key, values in tensors.items()
        }
        rows = replace(rows, position=np.full(min(len(wanted), 1), -1, dtype=np.int32))
    if plan.dtype != "model":
        tensors = {key: values.to(getattr(torch, plan.dtype)) for key, values in tensors.items()}
    return replace(rows, tensors=tensors)


def _check(rows: CapturedRows, wanted: list[int]) -> None:
    if rows.position.tolist() != wanted:
        raise RowsMissingError(f"{len(rows.position)} rows were captured, not the {len(wanted)} that there should be")
