"""Captures rows of a running batch: one copy per forward for all requests, and one set of tensors per request at its end.

    batch   one forward's value at a tap, for all requests: [batch, tokens, *shape]
      │       StepRows selects the wanted tokens; requests that want the same keys form a cohort
      ▼
    block   a cohort's rows of one forward, for all keys of one shape and dtype: [keys, rows, *shape]
      │       one copy, on the model's device; from a GPU it is sent to pinned memory
      ▼
    span    one request's rows [start, stop) of a block
      │       RequestRows joins its spans every JOIN_EVERY forwards, and when it ends
      ▼
    rows    one request's tensors, per key: [rows, *shape] (CapturedRows)

Writing the block is the only copy that is made while the model runs, so the cost of a step does not grow with the number of
requests. For a pooled policy (a mean) a block holds one row per request instead, the sum over the forward's rows: pooled
positions are reduced on the model's device.

A block is sent from a GPU in one asynchronous copy, on a stream of its own, while the next step runs. A request joins its
spans into tensors of its own, because a span keeps alive the rows of all requests in its block. All of this memory comes from
one `RowMemory`.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from roentgen.contract import CapturedDtype, Positions
from serve_app.capture.batch_layout import BatchLayout, RowSelection
from serve_app.capture.row_memory import RowMemory
from serve_app.capture.structure import Tap
from serve_app.errors import RequestError


@dataclass(frozen=True)
class CapturePlan:
    """Which rows one request keeps."""

    taps: dict[str, Tap]
    """Per stored key, the tap to read."""
    positions: Positions
    """Which positions to keep."""
    dtype: CapturedDtype
    """Dtype of the captured rows."""
    n_prompt: int | None = None
    """Tokens before the completion; None if that is the job's whole prompt. It is not when a finished answer is read again."""
    first: int = 0
    """First position that may be kept."""
    stop: int | None = None
    """Position behind the last that may be kept; None for no limit."""

    def kept(self, n_prompt: int, start: int, stop: int) -> range:
        """Return the positions in `[start, stop)` to keep, of a job with `n_prompt` prompt tokens."""
        if self.stop is not None:
            stop = min(stop, self.stop)
        if self.n_prompt is not None:
            n_prompt = self.n_prompt
        return self.positions.select(n_prompt, stop, first=max(start, self.first))

    def count(self, n_prompt: int, n_rows: int) -> int:
        """Return the number of rows that are kept of a job with `n_rows` rows."""
        return 1 if self.positions.pooled else len(self.kept(n_prompt, 0, n_rows))


@dataclass(frozen=True)
class CapturedRows:
    """A finished request's rows, in CPU memory of their own."""

    tensors: dict[str, Float[Tensor, "rows ..."]]
    """Per stored key, `[rows, *shape]`."""
    position: Int[np.ndarray, "rows"]
    """Sequence position of each row, -1 for a pooled row: `[rows]`."""


@dataclass(frozen=True)
class KnownRows:
    """Rows of consecutive positions that are known from an earlier request, so the model does not read their tokens again."""

    kept: range
    """Positions to keep."""
    start: int
    """Position of the first row."""
    rows: Mapping[Tap, Float[Tensor, "rows ..."]]
    """Per tap, the rows as the model computed them."""

    def wanted(self, tap: Tap) -> Float[Tensor, "kept ..."]:
        """Return the rows of a tap to keep, as a view."""
        return self.rows[tap][self.kept.start - self.start : self.kept.stop - self.start : self.kept.step]


class UncapturableError(RequestError):
    """A requested hook point has no row per token, so it cannot be captured; the message names the stored key."""

    param, prefix = "activations.hook_points", "activations.hook_points: "


JOIN_EVERY = 32
"""Number of forwards after which a request's rows are copied out of the blocks, which hold the rows of the whole batch."""


@dataclass
class _Block:
    """One forward's rows, for those keys of a cohort that have the same shape and dtype."""

    tensor: Float[Tensor, "keys rows ..."]
    """`[keys, rows, *shape]`; for a pooled policy each row is a sum, in float32."""
    dtype: torch.dtype
    """Dtype of the model's values."""
    keys: list[str] = field(default_factory=list)
    """Keys of the first `len(keys)` entries of `tensor`; the others are unused."""
    copied: torch.cuda.Event | None = None
    """On a GPU, the event after which the copy to `tensor` is complete."""

    def rows(self, start: int, stop: int) -> Float[Tensor, "keys rows ..."]:
        if self.copied is not None:
            self.copied.synchronize()
        return self.tensor[: len(self.keys), start:stop]


@dataclass(frozen=True)
class _Span:
    blocks: list[_Block]
    start: int
    stop: int

    def rows(self, keys: list[str]) -> Float[Tensor, "keys rows ..."]:
        """Return the rows of keys that share a block, in the order of `keys`; forwards may read keys in different orders."""
        block = next(block for block in self.blocks if keys[0] in block.keys)
        rows = block.rows(self.start, self.stop)
        return rows if block.keys == keys else rows[[block.keys.index(key) for key in keys]]


class RequestRows:
    """The rows of one running request: spans of recent blocks, and the joined rows of earlier ones.

    Attributes:
        plan: which rows to keep.
        begun: whether a forward has been read.
        failure: why its capture fails, once that is known.
    """

    def __init__(self, plan: CapturePlan, n_prompt: int, memory: RowMemory) -> None:
        """Create empty rows.

        Args:
            plan: which rows to keep.
            n_prompt: tokens of the job's prompt.
            memory: allocates joined rows.
        """
        self.plan = plan
        self.begun = False
        self._n_prompt = n_prompt
        self._memory = memory
        self._position: list[int] = []
        self._own: list[_Span] = []
        self._shared: list[_Span] = []
        self._known: list[KnownRows] = []
        self.failure: UncapturableError | None = None

    def kept(self, span: range) -> range:
        """Return the positions to keep among a forward's sequence positions."""
        return self.plan.kept(self._n_prompt, span.start, span.stop)

    def add(self, kept: range, blocks: list[_Block], start: int, stop: int, failure: str | None) -> None:
        """Add rows `[start, stop)` of a forward's blocks; they follow the earlier rows in position.

        Args:
            kept: their sequence positions.
            blocks: the blocks of all the cohort's keys.
            start: the first row.
            stop: behind the last row.
            failure: why there are no rows, if a key has no value.
        """
        self.begun = True
        if failure is not None:
            self.failure = self.failure or UncapturableError(failure)
        if self.failure is not None:
            return  # other requests of this forward are not affected
        if self._known:
            self._own.append(self._laid_out(self._known, blocks))
            self._known = []
        if self.plan.positions.policy == "last" and kept:
            self._position = []
        self._position += kept
        if self.plan.positions.policy == "last" and stop > start:
            self._own, self._shared = [], []  # drop the rows that are no longer the last
        self._shared.append(_Span(blocks, start, stop))
        if len(self._shared) >= JOIN_EVERY:
            self._own.append(self._joined(self._shared))
            self._shared = []

    def resume(self, known: Sequence[KnownRows]) -> None:
        """Add the known rows of the first tokens, in order, as if the model had read these tokens.

        A forward may already have added rows of the tokens behind them.
        """
        known = [part for part in known if part.kept]
        self._position = [position for part in known for position in part.kept] + self._position
        if known and self._own + self._shared:
            self._own.insert(0, self._laid_out(known, (self._own + self._shared)[0].blocks))
        else:
            self._known = known

    def between(self, start: int, stop: int, taps: Collection[Tap]) -> dict[Tap, Float[Tensor, "rows ..."]]:
        """Return copies of the rows of positions `[start, stop)` at some taps; empty if any of these rows is not here."""
        first = bisect_left(self._position, start)
        here = self._position[first : first + stop - start] == list(range(start, stop))
        if not here or self.failure is not None or self.plan.positions.pooled:
            return {}
        pieces: list[_Span] = []
        at = 0
        for span in self._own + self._shared:
            length = span.stop - span.start
            low, high = max(first - at, 0), min(first + stop - start - at, length)
            if low < high:
                pieces.append(_Span(span.blocks, span.start + low, span.start + high))
            at += length
        found: dict[Tap, Tensor] = {}
        for block in pieces[0].blocks:
            numbers = [number for number, key in enumerate(block.keys) if self.plan.taps[key] in taps]
            if not numbers:
                continue
            parts = [piece.rows(block.keys) for piece in pieces]
            if len(numbers) == len(block.keys):
                rows = list(torch.cat(parts, dim=1) if len(parts) > 1 else parts[0].clone())
            else:  # copied separately, so that no row keeps unwanted keys alive
                rows = [torch.cat([part[number] for part in parts]) for number in numbers]
            found.update(zip((self.plan.taps[block.keys[number]] for number in numbers), rows, strict=True))
        return found

    def cut(self) -> CapturedRows:
        """Return this request's rows as tensors of their own.

        Raises:
            UncapturableError: if a tapped module did not run in every forward, or has no row per token.
        """
        spans = self._own + self._shared
        if self.failure is not None:
            raise self.failure
        if not spans:
            raise UncapturableError(_no_rows(next(iter(self.plan.taps))))
        dtype = None if self.plan.dtype == "model" else getattr(torch, self.plan.dtype)
        found: dict[str, Tensor] = {}
        joined = spans[0] if len(self._own) == 1 and not self._shared else self._joined(spans)
        self._own, self._shared = [joined], []
        for block in joined.blocks:
            values = block.tensor
            if self.plan.positions.pooled:
                values = values[:, :1] / max(len(self._position), 1) if self._position else values[:, :0]
            values = values.to(device="cpu", dtype=dtype or block.dtype)
            found.update(zip(block.keys, values, strict=True))
        position = [-1] * bool(self._position) if self.plan.positions.pooled else self._position
        return CapturedRows({key: found[key] for key in self.plan.taps}, np.array(position, dtype=np.int32))

    def _laid_out(self, known: Sequence[KnownRows], like: list[_Block]) -> _Span:
        """Copy known rows into blocks of this request's own, with the same keys as a forward's blocks."""
        pooled = self.plan.positions.pooled
        count = 1 if pooled else sum(len(part.kept) for part in known)
        blocks = []
        for block in like:
            taps = [self.plan.taps[key] for key in block.keys]
            rows = self._memory.empty(
                (len(taps), count, *block.tensor.shape[2:]), block.tensor.dtype, torch.device("cpu")
            )
            for target, tap in zip(rows, taps, strict=True):
                parts = [part.wanted(tap) for part in known]
                if pooled:
                    target[0] = torch.stack([part.float().sum(0) for part in parts]).sum(0)
                else:
                    torch.cat(parts, out=target)
            blocks.append(_Block(rows, block.dtype, block.keys))
        return _Span(blocks, 0, count)

    def _joined(self, spans: list[_Span]) -> _Span:
        """Copy the rows of spans, in order, into blocks of this request's own; sums are added up."""
        blocks = []
        for first in spans[0].blocks:
            parts = [span.rows(first.keys) for span in spans]
            shape = (len(parts[0]), sum(part.shape[1] for part in parts), *parts[0].shape[2:])
            rows = self._memory.empty(shape, parts[0].dtype, parts[0].device)
            torch.cat(parts, dim=1, out=rows)
            if self.plan.positions.pooled:
                rows = rows.sum(1, keepdim=True)
            blocks.append(_Block(rows, first.dtype, first.keys))
        return _Span(blocks, 0, blocks[0].tensor.shape[1])


def _no_rows(key: str) -> str:
    return f"{key} has no row per token, so it cannot be captured"


class _Cohort:
    """The requests of one forward that capture the same keys, pooled or not, and the blocks gathered for them."""

    def __init__(self, keys: tuple[str, ...], pooled: bool, memory: RowMemory) -> None:
        self.keys = keys
        self.pooled = pooled
        self._memory = memory
        self.spans: list[tuple[RequestRows, range, int, int]] = []
        self.failure: str | None = None
        self.selection = RowSelection()
        self.sums: list[int] = []
        self.blocks: list[_Block] = []

    def want(self, request: RequestRows, kept: range, indices: range) -> None:
        """Gather the rows at these flat indices, which have the positions `kept`, for a request."""
        start = len(self.sums) if self.pooled else len(self.selection)
        self.selection.extend(indices)
        if self.pooled and indices:
            self.sums.append(len(indices))
        self.spans.append((request, kept, start, len(self.sums) if self.pooled else len(self.selection)))

    def gather(self, key: str, flat: Float[Tensor, "tokens ..."], plus: Float[Tensor, "tokens ..."] | None) -> None:
        """Copy the selected rows of a value, or of the sum of two values; only selected rows are added."""
        dtype = flat.dtype if plus is None else torch.result_type(flat, plus)
        if self.pooled:
            rows = self.selection.of(flat) if plus is None else self.selection.of(flat) + self.selection.of(plus)
            rows = rows.float()
            if len(self.sums) < len(self.selection):
                lengths = torch.tensor(self.sums, device=flat.device)
                rows = torch.segment_reduce(rows.flatten(1), "sum", lengths=lengths).reshape(-1, *flat.shape[1:])
            self._target(key, tuple(rows.shape), dtype, flat.device).copy_(rows)
            return
        target = self._target(key, (len(self.selection), *flat.shape[1:]), dtype, flat.device)
        if plus is not None:
            torch.add(self.selection.of(flat), self.selection.of(plus), out=target)
        elif isinstance(where := self.selection.where(flat.device), slice):
            target.copy_(flat[where])
        else:
            torch.index_select(flat, 0, where, out=target)

    def _target(
        self, key: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Float[Tensor, "rows ..."]:
        block = self._block(shape, dtype, device)
        block.keys.append(key)
        return block.tensor[len(block.keys) - 1]

    def _block(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> _Block:
        for block in self.blocks:
            if block.tensor.shape[1:] == shape and block.dtype == dtype and block.tensor.device == device:
                return block
        kept_as = torch.float32 if self.pooled else dtype
        self.blocks.append(_Block(self._memory.empty((len(self.keys), *shape), kept_as, device), dtype))
        return self.blocks[-1]


class StepRows:
    """Captures one forward: gathers the wanted rows of each tapped value.

    Attributes:
        taps: per stored key, the tap to read in this forward; a key is left out if no row of it is kept.
    """

    def __init__(self, requests: list[RequestRows | None], layout: BatchLayout, memory: RowMemory) -> None:
        """Plan one forward's capture.

        Args:
            requests: per batch row, the request's rows; None if it captures nothing.
            layout: the batch's layout.
            memory: allocates the blocks.
        """
        self._layout = layout
        self._memory = memory
        cohorts: dict[tuple[tuple[str, ...], bool], _Cohort] = {}
        self._of_key: dict[str, list[_Cohort]] = defaultdict(list)
        self.taps: dict[str, Tap] = {}
        for row, request in enumerate(requests):
            if request is None:
                continue
            kept = request.kept(layout.spans[row])
            # The first forward is read even if it keeps no row: it determines the shape of empty tensors.
            if not kept and request.begun:
                continue
            kind = tuple(request.plan.taps), request.plan.positions.pooled
            if kind not in cohorts:
                cohorts[kind] = _Cohort(*kind, memory)
                self.taps.update(request.plan.taps)
                for key in kind[0]:
                    self._of_key[key].append(cohorts[kind])
            cohorts[kind].want(request, kept, layout.flat_indices(row, kept))
        self._cohorts = list(cohorts.values())

    def __call__(
        self, key: str, value: Float[Tensor, "batch tokens ..."], plus: Float[Tensor, "batch tokens ..."] | None = None
    ) -> None:
        """Copy the wanted rows of a tapped value, or of the sum of two values; a value without a row per token is skipped."""
        flat = self._layout.flat(value)
        other = self._layout.flat(plus) if plus is not None else None
        if flat is None or (plus is not None and other is None):
            return
        for cohort in self._of_key[key]:
            cohort.gather(key, flat, other)

    def fail(self, key: str, reason: str) -> None:
        """Record that a key has no value; only the requests that asked for it fail."""
        for cohort in self._of_key[key]:
            cohort.failure = cohort.failure or reason

    def deliver(self) -> None:
        """Add each request's span to its rows, once the forward has been launched."""
        for cohort in self._cohorts:
            failure = cohort.failure
            blocks = [] if failure else [self._on_host(block) for block in cohort.blocks]
            gathered = {key for block in blocks for key in block.keys}
            failure = failure or next((_no_rows(key) for key in cohort.keys if key not in gathered), None)
            for request, kept, start, stop in cohort.spans:
                request.add(kept, blocks, start, stop, failure)

    def _on_host(self, block: _Block) -> _Block:
        tensor, copied = self._memory.to_host(block.tensor[: len(block.keys)])
        return _Block(tensor, block.dtype, block.keys, copied)
