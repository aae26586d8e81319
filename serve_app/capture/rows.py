"""The rows kept of a running batch: copied once per forward for all requests, cut per request when one ends.

A forward sees `[batch, tokens]` positions, of which some are padding and some are not wanted. Requests that want the same
keys form a cohort; per forward, `StepRows` gathers the wanted positions of all of a cohort's keys into one block
`[keys, rows, *shape]`, which is the only copy made while the model runs, and each request then owns a span of it. So the
cost of a step does not grow with the number of requests. For a pooled policy the block holds each request's sum over the
forward's rows instead: pooled positions are reduced where they are, on the model's device.

From a GPU a block goes to pinned memory in one asynchronous copy, on a stream of its own, while the next step runs. Every few
steps, and when it ends, a request's spans are joined into tensors of its own, so that a long request does not keep alive
what ran beside it. All of it lies in one `RowMemory`.
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
    """What one request keeps."""

    taps: dict[str, Tap]
    """Per stored key, where to read."""
    positions: Positions
    """Which of its rows."""
    dtype: CapturedDtype
    """What to gather them in."""
    n_prompt: int | None = None
    """Tokens before the completion; None says that the whole of the job's prompt is (it is not, when a finished answer is
    read again)."""
    first: int = 0
    """Rows before this position are not kept."""
    stop: int | None = None
    """Rows from this position on are not kept."""

    def kept(self, n_prompt: int, start: int, stop: int) -> range:
        """Return the positions in `[start, stop)` to keep, of a job whose prompt has `n_prompt` tokens."""
        if self.stop is not None:
            stop = min(stop, self.stop)
        if self.n_prompt is not None:
            n_prompt = self.n_prompt
        return self.positions.select(n_prompt, stop, first=max(start, self.first))

    def count(self, n_prompt: int, n_rows: int) -> int:
        """Return how many rows are kept of a job with `n_rows` of them."""
        return 1 if self.positions.pooled else len(self.kept(n_prompt, 0, n_rows))


@dataclass(frozen=True)
class CapturedRows:
    """A finished request's rows, on the CPU, owning their memory."""

    tensors: dict[str, Float[Tensor, "rows ..."]]
    """Per stored key, `[rows, *shape]`."""
    position: Int[np.ndarray, "rows"]
    """Sequence position per row, -1 for a pooled row, `[rows]`."""


@dataclass(frozen=True)
class KnownRows:
    """Rows of a stretch of positions that an earlier request has shown: these tokens are not fed again."""

    kept: range
    """The positions to keep of them."""
    start: int
    """The position of the first row."""
    rows: Mapping[Tap, Float[Tensor, "rows ..."]]
    """By where they were read, as the model gave them."""

    def wanted(self, tap: Tap) -> Float[Tensor, "kept ..."]:
        """Return a tap's rows that are kept; a view."""
        return self.rows[tap][self.kept.start - self.start : self.kept.stop - self.start : self.kept.step]


class UncapturableError(RequestError):
    """A request's hook point gave no row per token, so what it asked for cannot be kept; the message names the key."""

    param, prefix = "activations.hook_points", "activations.hook_points: "


JOIN_EVERY = 32
"""Forwards after which a request's rows are copied out of the blocks, which hold the rows of the whole batch."""


@dataclass
class _Block:
    """One forward's rows of a cohort's keys that have the same shape and dtype."""

    tensor: Float[Tensor, "keys rows ..."]
    """`[keys, rows, *shape]`; for a pooled policy each row is a sum, in float32."""
    dtype: torch.dtype
    """The values' own."""
    keys: list[str] = field(default_factory=list)
    """The first `len(keys)` of the tensor's are in use."""
    copied: torch.cuda.Event | None = None
    """On a GPU, the event after which `tensor` is there."""

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
        """Return the rows of keys that share a block, in this order: another forward may have read them in another one."""
        block = next(block for block in self.blocks if keys[0] in block.keys)
        rows = block.rows(self.start, self.stop)
        return rows if block.keys == keys else rows[[block.keys.index(key) for key in keys]]


class RequestRows:
    """The rows of one running request: spans of the latest forwards' blocks, and what has been joined of earlier ones.

    Attributes:
        plan: what to keep.
        begun: whether a forward has been read.
        failure: why it cannot have what it asked for, once that is known.
    """

    def __init__(self, plan: CapturePlan, n_prompt: int, memory: RowMemory) -> None:
        """Begin before the first token.

        Args:
            plan: what to keep.
            n_prompt: tokens in the job's prompt.
            memory: for its joined rows.
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
        """Return which of a forward's sequence positions to keep."""
        return self.plan.kept(self._n_prompt, span.start, span.stop)

    def add(self, kept: range, blocks: list[_Block], start: int, stop: int, failure: str | None) -> None:
        """Take rows `[start, stop)` of a forward's blocks, the next ones in order of position.

        Args:
            kept: their sequence positions.
            blocks: of all the cohort's keys.
            start: the first row.
            stop: behind the last.
            failure: why there are none, if a key could not be had.
        """
        self.begun = True
        if failure is not None:
            self.failure = self.failure or UncapturableError(failure)
        if self.failure is not None:
            return  # others in this forward have what they asked for
        if self._known:
            self._own.append(self._laid_out(self._known, blocks))
            self._known = []
        if self.plan.positions.policy == "last" and kept:
            self._position = []
        self._position += kept
        if self.plan.positions.policy == "last" and stop > start:
            self._own, self._shared = [], []  # what was last is not any more
        self._shared.append(_Span(blocks, start, stop))
        if len(self._shared) >= JOIN_EVERY:
            self._own.append(self._joined(self._shared))
            self._shared = []

    def resume(self, known: Sequence[KnownRows]) -> None:
        """Begin behind tokens whose rows are known, in order: they are kept as if the model had been fed these tokens.

        A forward may have shown the rows of the tokens behind them already.
        """
        known = [part for part in known if part.kept]
        self._position = [position for part in known for position in part.kept] + self._position
        if known and self._own + self._shared:
            self._own.insert(0, self._laid_out(known, (self._own + self._shared)[0].blocks))
        else:
            self._known = known

    def between(self, start: int, stop: int, taps: Collection[Tap]) -> dict[Tap, Float[Tensor, "rows ..."]]:
        """Copy the rows of positions `[start, stop)` from some places, as the model gave them; nothing if any is not here."""
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
            else:  # copied apart, so that none keeps alive what is not wanted
                rows = [torch.cat([part[number] for part in parts]) for number in numbers]
            found.update(zip((self.plan.taps[block.keys[number]] for number in numbers), rows, strict=True))
        return found

    def cut(self) -> CapturedRows:
        """Join this request's rows into tensors of their own.

        Raises:
            UncapturableError: if a tapped module did not run in every forward, or gave no row per token.
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
        """Put known rows into blocks of this request's own, which hold the keys that a forward's blocks hold."""
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
    return f"{key} does not give a row per token, so it cannot be captured"


class _Cohort:
    """The requests of a forward that want the same keys in the same way, and what is gathered for them."""

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
        """Gather these flat indices, which hold the positions `kept`, for a request."""
        start = len(self.sums) if self.pooled else len(self.selection)
        self.selection.extend(indices)
        if self.pooled and indices:
            self.sums.append(len(indices))
        self.spans.append((request, kept, start, len(self.sums) if self.pooled else len(self.selection)))

    def gather(self, key: str, flat: Float[Tensor, "tokens ..."], plus: Float[Tensor, "tokens ..."] | None) -> None:
        """Copy the wanted rows of one value, or of the sum of two: only what is wanted is added up."""
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
    """One forward's capture: gathers the wanted rows of each tapped value.

    Attributes:
        taps: per stored key, where to read in this forward; nothing if no row of it is kept.
    """

    def __init__(self, requests: list[RequestRows | None], layout: BatchLayout, memory: RowMemory) -> None:
        """Lay out one forward's rows.

        Args:
            requests: per batch row, the request's rows, None if it captures nothing.
            layout: how the rows lie.
            memory: for the blocks.
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
            # The first forward is read even if it keeps no row: it tells the shape of what has none.
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
        """Copy the wanted rows of one tapped value, or of the sum of two; a value without a row per token is left out."""
        flat = self._layout.flat(value)
        other = self._layout.flat(plus) if plus is not None else None
        if flat is None or (plus is not None and other is None):
            return
        for cohort in self._of_key[key]:
            cohort.gather(key, flat, other)

    def fail(self, key: str, reason: str) -> None:
        """Take note that a key cannot be had: the requests that asked for it fail, and no others."""
        for cohort in self._of_key[key]:
            cohort.failure = cohort.failure or reason

    def deliver(self) -> None:
        """Give each request its span, once the forward has been issued."""
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
