"""Decides which rows to collect while a request's end is not known yet, and which of them to keep once it is known.

A request may overrun: rows are computed that belong to the last token of the completion, or to tokens behind its end. If a
stop string or a probe's score ends the completion, this is known only when the row behind the end has been computed. So
everything that depends on the end (the last row, the mean of all generated rows) is decided afterwards, and rows behind the
end are dropped.
"""

from dataclasses import replace

import numpy as np
import torch

from roentgen.contract import Positions
from serve_app.capture.rows import CapturedRows, CapturePlan


class RowsMissingError(Exception):
    """The collected rows are not the expected ones; the message has both counts."""


def collecting_plan(plan: CapturePlan, n_prompt: int) -> CapturePlan:
    """Return the plan to collect with while the end of the completion is not known.

    Args:
        plan: which rows to keep in the end.
        n_prompt: tokens in the prompt.
    """
    match plan.positions.policy:
        case "last":
            return replace(plan, positions=Positions("all"), dtype="model", first=max(plan.first, n_prompt - 1))
        case "mean_generated":
            return replace(plan, positions=Positions("generated"), dtype="model")
        case _:
            return plan


def finalize_rows(rows: CapturedRows, plan: CapturePlan, n_prompt: int, n_rows: int) -> CapturedRows:
    """Return the rows that a plan keeps of what `collecting_plan` has collected, once the end is known.

    Args:
        rows: the collected rows, perhaps beyond the end.
        plan: which rows to keep.
        n_prompt: tokens in the prompt.
        n_rows: rows of a full capture.

    Raises:
        RowsMissingError: if the collected rows are not the expected ones.
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
        raise RowsMissingError(f"{len(rows.position)} rows were captured; {len(wanted)} were expected")
