"""Scores the rows of a running batch with linear probes, while the model runs.

A probe reads one hook point. Requests with the same probes form a cohort. Per forward and hook point, `StepScores` scores the
rows of all of a cohort's requests with all its probes there in one matrix product. Only the scores of a row are kept, those of
all its probes side by side. Every token that the model processes is scored: the prompt's tokens, and the generated tokens
except the last. Scores are copied from a GPU in the same way as captured rows.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from serve_app.capture.batch_layout import BatchLayout, RowSelection
from serve_app.capture.row_memory import RowMemory
from serve_app.capture.structure import Tap
from serve_app.errors import RequestError

if TYPE_CHECKING:
    # Imported as a type only: importing it loads the store, and with it pyarrow.
    from roentgen.linear_probe import LinearProbe, ScoreUnit

Place = tuple[str, int]
"""What a probe reads: a stored key, and the width of its rows."""

MAX_STACKS = 64
"""Number of stacked sets of probes that are cached."""


class UnscorableError(RequestError):
    """A request's probe cannot read its hook point; the message names both."""

    param, prefix = "probes", "probes: "


@dataclass(frozen=True, eq=False)
class RequestProbe:
    """A probe that a request asks for."""

    name: str
    """Its name in the reply."""
    key: str
    """The stored key it reads."""
    tap: Tap
    """The key's tap."""
    linear_probe: "LinearProbe"
    """The linear probe, on the model's device."""
    label: str
    """The label that it predicts."""
    classes: tuple[str, ...] = ()
    """Names of its outputs, if they have names."""
    unit: "ScoreUnit" = "score"
    """Unit of its scores, see `ProbeCard`."""


@dataclass(frozen=True, eq=False)
class _KeyProbes:
    """The probes that read one key: the scores of rows are `(rows − mean) · weight + bias`."""

    mean: Float[Tensor, "d"]
    weight: Float[Tensor, "d outputs"]
    bias: Float[Tensor, "outputs"]

    @classmethod
    def of(cls, probes: "list[LinearProbe]") -> "_KeyProbes":
        """Stack probes of one width."""
        # The common part of the means is subtracted first: rows may be far from zero, and close to the means.
        mean = probes[0].mean
        weights = [(one.weight / one.scale).mT for one in probes]
        biases = [one.bias + (mean - one.mean) @ weight for one, weight in zip(probes, weights, strict=True)]
        return cls(mean, torch.cat(weights, dim=1), torch.cat(biases))


class StackedProbes:
    """The probes of a request, stacked so that one product scores rows with all probes that read the same key.

    Attributes:
        columns: per probe, the columns of its scores among all scores of a row.
        width: number of scores of a row.
    """

    def __init__(self, probes: "tuple[tuple[str, LinearProbe], ...]") -> None:
        """Stack probes.

        Args:
            probes: each with the key that it reads.
        """
        self._together: dict[Place, list[LinearProbe]] = defaultdict(list)
        numbers: dict[Place, list[int]] = defaultdict(list)
        for number, (key, probe) in enumerate(probes):
            place = key, probe.mean.shape[0]
            self._together[place].append(probe)
            numbers[place].append(number)
        columns: dict[int, slice] = {}
        self.width = 0
        for place in self._together:
            for number in numbers[place]:
                start, self.width = self.width, self.width + len(probes[number][1].bias)
                columns[number] = slice(start, self.width)
        self.columns = [columns[number] for number in range(len(probes))]

    @cached_property
    def by_key(self) -> "dict[Place, _KeyProbes]":
        """Per key and width, its probes in the order of their columns."""
        return {place: _KeyProbes.of(probes) for place, probes in self._together.items()}


@lru_cache(maxsize=MAX_STACKS)
def _stack(probes: "tuple[tuple[str, LinearProbe], ...]") -> StackedProbes:
    """Stack probes, once for all requests with the same probes: a probe that is loaded once is one object."""
    return StackedProbes(probes)


@dataclass(frozen=True)
class NewScores:
    """New scores of a request, on the CPU."""

    scores: Float[Tensor, "rows scores"] | None
    """Scores of the next rows, of all probes side by side; None if there are none."""
    failure: UnscorableError | None
    """Why scoring fails, if it does."""


@dataclass(frozen=True)
class _Part:
    """The scores of one forward's rows, of which some belong to a request."""

    scores: Float[Tensor, "batch scores"]
    start: int
    stop: int
    copied: torch.cuda.Event | None = None
    """On a GPU, the event after which the copy is complete."""

    @property
    def there(self) -> bool:
        return self.copied is None or bool(self.copied.query())

    def taken(self) -> Float[Tensor, "rows scores"]:
        if self.copied is not None:
            self.copied.synchronize()
        return self.scores[self.start : self.stop]


class RequestScores:
    """The scores of one running request.

    Attributes:
        probes: its probes.
        stacked: the same probes, stacked.
        n_scored: tokens that have been scored.
        failure: why its scoring fails, once that is known.
    """

    def __init__(self, probes: tuple[RequestProbe, ...]) -> None:
        """Create empty scores."""
        self.probes = probes
        self.stacked = _stack(tuple((probe.key, probe.linear_probe) for probe in probes))
        self.n_scored = 0
        self.failure: UnscorableError | None = None
        self._parts: list[_Part] = []
        self._taken = 0

    def add(self, part: _Part) -> None:
        """Add the scores of the next rows."""
        self._parts.append(part)
        self.n_scored += part.stop - part.start

    def resume(self, length: int, rows: Mapping[Tap, Float[Tensor, "rows ..."]]) -> None:
        """Score the first tokens, whose rows are known, as if the model had read them.

        Args:
            length: number of these tokens.
            rows: their rows, by tap.
        """
        known = _ProbeCohort(self.stacked)
        known.want(self, range(length))
        for key, (tap, device) in {one.key: (one.tap, one.linear_probe.mean.device) for one in self.probes}.items():
            if rows[tap].ndim == 2:
                known.score(key, rows[tap].to(device))
        later, self._parts = self._parts, []  # a forward may already have scored the tokens behind them
        known.hand_out(lambda scores: (scores.cpu(), None))
        self._parts += later

    def drain(self) -> "NewScores":
        """Return and drop the scores since the last call; of scores still on their way from a GPU, at most the next."""
        ready = next((i for i, part in enumerate(self._parts) if i and not part.there), len(self._parts))
        taken, self._parts = self._parts[:ready], self._parts[ready:]
        return NewScores(torch.cat([part.taken() for part in taken]) if taken else None, self.failure)

    def receive(self, new: "NewScores") -> None:
        """Add scores that `drain` has returned elsewhere."""
        self.failure = self.failure or new.failure
        if new.scores is not None:
            self.add(_Part(new.scores, 0, len(new.scores)))

    def restart(self) -> None:
        """Drop all scores; those that have been taken are not returned again."""
        self._parts, self.n_scored = [], 0

    def fail(self, key: str, reason: str) -> None:
        """Record that a key has no value, if a probe reads it."""
        name = next((probe.name for probe in self.probes if probe.key == key), None)
        if name is not None:
            self.failure = self.failure or UnscorableError(f"{reason}, which the probe {name!r} reads")

    def unread(self, places: Set[Place]) -> None:
        """Record that some keys did not have the rows that probes read."""
        for probe in self.probes:
            width = probe.linear_probe.mean.shape[0]
            if self.failure is None and (probe.key, width) in places:
                self.failure = UnscorableError(
                    f"{probe.key} has no row of {width} values per token, which the probe {probe.name!r} reads"
                )

    def take(self, most: int | None = None) -> list[Float[Tensor, "rows outputs"]]:
        """Return, per probe, the scores since the last call; empty if there are none.

        Args:
            most: number of rows that the request has, as far as is known; None for the number of scores.

        Raises:
            UnscorableError: if a probe's hook point has no row per token of the probe's width.
        """
        stop = self.n_scored if most is None else min(self.n_scored, most)
        if self.failure is not None:
            raise self.failure
        if stop <= self._taken:
            return []
        start, self._taken = self._taken, stop
        return self._of_probes(self._between(start, stop))

    def all(self) -> list[Float[Tensor, "rows outputs"]]:
        """Return the scores of all rows so far, per probe.

        Raises:
            UnscorableError: see `take`; also if a score is not finite.
        """
        if self.failure is not None:
            raise self.failure
        return self._of_probes(self._between(0, self.n_scored))

    def last(self, count: int) -> list[Float[Tensor, "rows outputs"]]:
        """Return, per probe, the scores of the last rows; on a GPU, wait for them.

        Raises:
            UnscorableError: see `all`.
        """
        if self.failure is not None:
            raise self.failure
        return self._of_probes(self._between(self.n_scored - count, self.n_scored))

    def _between(self, start: int, stop: int) -> Float[Tensor, "rows scores"]:
        """Return the scores of some rows. Parts are searched from the last, because mostly new scores are asked for."""
        found, end = [torch.empty(0, self.stacked.width)], self.n_scored
        for part in reversed(self._parts):
            if end <= start:
                break
            begin = end - (part.stop - part.start)
            found.append(part.taken()[max(start - begin, 0) : max(stop - begin, 0)])
            end = begin
        return torch.cat(found[::-1])

    def _of_probes(self, scores: Float[Tensor, "rows scores"]) -> list[Float[Tensor, "rows outputs"]]:
        """Split scores into those of each probe.

        Raises:
            UnscorableError: if a score is not finite.
        """
        found = [scores[:, columns] for columns in self.stacked.columns]
        if not scores.isfinite().all():
            (name, *_) = (s.name for s, one in zip(self.probes, found, strict=True) if not one.isfinite().all())
            raise UnscorableError(f"the probe {name!r} gives a score that is not finite")
        return found


class _ProbeCohort:
    """The requests of one forward with the same probes, and their scores."""

    def __init__(self, stacked: StackedProbes) -> None:
        self.stacked = stacked
        self.spans: list[tuple[RequestScores, int, int]] = []
        self.selection = RowSelection()
        self.found: dict[Place, Float[Tensor, "wanted outputs"]] = {}

    def want(self, request: RequestScores, indices: range) -> None:
        """Score the rows at these flat indices for a request."""
        start = len(self.selection)
        self.selection.extend(indices)
        self.spans.append((request, start, len(self.selection)))

    def score(self, key: str, flat: Float[Tensor, "tokens width"]) -> None:
        """Score the selected rows with all probes that read this key."""
        place = key, flat.shape[1]
        if (key_probes := self.stacked.by_key.get(place)) is not None:
            # Copied, because this is the model's own value. A difference of two dtypes would take ten times as long.
            rows = self.selection.of(flat).to(key_probes.mean.dtype, copy=True).sub_(key_probes.mean)
            self.found[place] = torch.addmm(key_probes.bias, rows, key_probes.weight)

    def hand_out(self, send: Callable[[Tensor], tuple[Tensor, torch.cuda.Event | None]]) -> None:
        """Add each request's scores.

        Args:
            send: copies them to the host, and returns the event after which they are there.
        """
        unread = self.stacked.by_key.keys() - self.found.keys()
        if unread:
            for request, *_ in self.spans:
                request.unread(unread)
            return
        scores, copied = send(torch.cat([self.found[place] for place in self.stacked.by_key], dim=1))
        for request, start, stop in self.spans:
            request.add(_Part(scores, start, stop, copied))


class StepScores:
    """Scores one forward.

    Attributes:
        taps: per stored key, the tap to read in this forward.
    """

    def __init__(self, requests: list[RequestScores | None], layout: BatchLayout, memory: RowMemory) -> None:
        """Plan which rows are scored by which probes.

        Args:
            requests: per batch row, the request's scores; None if it has no probes.
            layout: the batch's layout.
            memory: copies scores to the host.
        """
        self._layout = layout
        self._memory = memory
        self.taps: dict[str, Tap] = {}
        cohorts: dict[StackedProbes, _ProbeCohort] = {}
        self._of_key: dict[str, list[_ProbeCohort]] = defaultdict(list)
        for row, request in enumerate(requests):
            if request is None:
                continue
            stacked = request.stacked
            if stacked not in cohorts:
                cohorts[stacked] = _ProbeCohort(stacked)
                for probe in request.probes:
                    self.taps[probe.key] = probe.tap
                for key in dict.fromkeys(probe.key for probe in request.probes):
                    self._of_key[key].append(cohorts[stacked])
            cohorts[stacked].want(request, layout.flat_indices(row, layout.spans[row]))
        self._cohorts = list(cohorts.values())

    def __call__(self, key: str, value: Float[Tensor, "rows width ..."]) -> None:
        """Score the selected rows of one value; a value that a probe cannot read is skipped, and its requests fail."""
        flat = self._layout.flat(value)
        if flat is None or flat.ndim != 2:
            return
        for cohort in self._of_key[key]:
            cohort.score(key, flat)

    def fail(self, key: str, reason: str) -> None:
        """Record that a key has no value; only the requests whose probes read it fail."""
        for cohort in self._of_key[key]:
            for request, *_ in cohort.spans:
                request.fail(key, reason)

    def deliver(self) -> None:
        """Add each request's scores, once the forward has been launched."""
        for cohort in self._cohorts:
            cohort.hand_out(self._memory.to_host)
