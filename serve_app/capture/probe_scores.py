"""Scores the rows of a running batch with probes, while the model runs.

A probe reads one hook point. The requests that ask for the same probes form a cohort; per forward and hook point, `StepScores`
scores the rows of all of a cohort with all its probes there in one product; what is kept of a row is its scores, those of
all its probes side by side. Every token that passes through the model is scored: those of the prompt, and those generated but
the last, which never does. From a GPU scores go to the host as captured rows do, beside what it computes.
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
    # Only a type here: importing it brings the store with it, and pyarrow.
    from roentgen.linear_probe import LinearProbe, ScoreUnit

Place = tuple[str, int]
"""What a probe reads: a stored key, and rows of a width."""

MAX_STACKS = 64
"""Sets of probes that are kept laid out."""


class UnscorableError(RequestError):
    """A request's probe cannot read its hook point, so what it asked for cannot be told; the message names both."""

    param, prefix = "probes", "probes: "


@dataclass(frozen=True, eq=False)
class RequestProbe:
    """A probe that a request asks for."""

    name: str
    """What the reply calls it."""
    key: str
    """The stored key it reads."""
    tap: Tap
    """Where that is."""
    probe: "LinearProbe"
    """The probe's arithmetic, on the model's device."""
    label: str
    """What it reads."""
    classes: tuple[str, ...] = ()
    """Names of its outputs, where they have names."""
    unit: "ScoreUnit" = "score"
    """What its scores are, see `ProbeCard`."""


@dataclass(frozen=True, eq=False)
class _KeyProbes:
    """The probes of a stacked that read one key: the scores of rows are `(rows − mean) · weight + bias`."""

    mean: Float[Tensor, "d"]
    weight: Float[Tensor, "d outputs"]
    bias: Float[Tensor, "outputs"]

    @classmethod
    def of(cls, probes: "list[LinearProbe]") -> "_KeyProbes":
        """Lay out probes of one width."""
        # What they share of their means is subtracted first: a row may be far from zero, and near to them.
        mean = probes[0].mean
        weights = [(one.weight / one.scale).mT for one in probes]
        biases = [one.bias + (mean - one.mean) @ weight for one, weight in zip(probes, weights, strict=True)]
        return cls(mean, torch.cat(weights, dim=1), torch.cat(biases))


class StackedProbes:
    """The probes of a request, laid out so that one product scores rows with all that read the same key.

    Attributes:
        columns: per probe, where its scores stand among all.
        width: how many scores a row has.
    """

    def __init__(self, probes: "tuple[tuple[str, LinearProbe], ...]") -> None:
        """Lay out probes.

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
        """The probes of each key and width, in the order of their columns."""
        return {place: _KeyProbes.of(probes) for place, probes in self._together.items()}


@lru_cache(maxsize=MAX_STACKS)
def _stack(probes: "tuple[tuple[str, LinearProbe], ...]") -> StackedProbes:
    """Lay out probes, once for all requests that ask for the same: a probe that is loaded once is one object."""
    return StackedProbes(probes)


@dataclass(frozen=True)
class NewScores:
    """A request's scores that have come since the last time, on the CPU."""

    scores: Float[Tensor, "rows scores"] | None
    """Of the next rows, those of all probes side by side; None where nothing has come."""
    failure: UnscorableError | None
    """Why there can be none, if that is known."""


@dataclass(frozen=True)
class _Part:
    """The scores of one forward's rows, of which a request has some."""

    scores: Float[Tensor, "batch scores"]
    start: int
    stop: int
    copied: torch.cuda.Event | None = None
    """On a GPU, the event after which they are there."""

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
        scorers: its probes.
        stacked: the same, laid out.
        n_scored: tokens that have been scored.
        failure: why it cannot have what it asked for, once that is known.
    """

    def __init__(self, scorers: tuple[RequestProbe, ...]) -> None:
        """Begin before the first token."""
        self.scorers = scorers
        self.stacked = _stack(tuple((scorer.key, scorer.probe) for scorer in scorers))
        self.n_scored = 0
        self.failure: UnscorableError | None = None
        self._parts: list[_Part] = []
        self._taken = 0

    def add(self, part: _Part) -> None:
        """Take the scores of the next rows."""
        self._parts.append(part)
        self.n_scored += part.stop - part.start

    def resume(self, length: int, rows: Mapping[Tap, Float[Tensor, "rows ..."]]) -> None:
        """Begin behind tokens whose rows are known, and score these.

        Args:
            length: how many.
            rows: theirs, by where they were read.
        """
        known = _Cohort(self.stacked)
        known.want(self, range(length))
        for key, (tap, device) in {one.key: (one.tap, one.probe.mean.device) for one in self.scorers}.items():
            if rows[tap].ndim == 2:
                known.score(key, rows[tap].to(device))
        later, self._parts = self._parts, []  # a forward may have scored the tokens behind them already
        known.hand_out(lambda scores: (scores.cpu(), None))
        self._parts += later

    def drain(self) -> "NewScores":
        """Return what has come since the last time, and keep none of it; of what has not arrived, the next at most."""
        ready = next((i for i, part in enumerate(self._parts) if i and not part.there), len(self._parts))
        taken, self._parts = self._parts[:ready], self._parts[ready:]
        return NewScores(torch.cat([part.taken() for part in taken]) if taken else None, self.failure)

    def receive(self, new: "NewScores") -> None:
        """Take what `drain` has given elsewhere."""
        self.failure = self.failure or new.failure
        if new.scores is not None:
            self.add(_Part(new.scores, 0, len(new.scores)))

    def restart(self) -> None:
        """Forget all scores; what has been taken is not given a second time."""
        self._parts, self.n_scored = [], 0

    def fail(self, key: str, reason: str) -> None:
        """Take note that a key cannot be had, if a probe reads it."""
        name = next((scorer.name for scorer in self.scorers if scorer.key == key), None)
        if name is not None:
            self.failure = self.failure or UnscorableError(f"{reason}, which the probe {name!r} reads")

    def unread(self, places: Set[Place]) -> None:
        """Take note that what some probes read was not there."""
        for scorer in self.scorers:
            width = scorer.probe.mean.shape[0]
            if self.failure is None and (scorer.key, width) in places:
                self.failure = UnscorableError(
                    f"{scorer.key} does not give a row of {width} per token, which the probe {scorer.name!r} reads"
                )

    def take(self, most: int | None = None) -> list[Float[Tensor, "rows outputs"]]:
        """Return, per probe, the scores that have come since the last time; nothing if none have.

        Args:
            most: rows that the request has, as far as is known; None for as many as there are scores.

        Raises:
            UnscorableError: if a probe's hook point gives no row per token, of the width that the probe reads.
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
            UnscorableError: see `take`; or if a score is not a finite number.
        """
        if self.failure is not None:
            raise self.failure
        return self._of_probes(self._between(0, self.n_scored))

    def last(self, count: int) -> list[Float[Tensor, "rows outputs"]]:
        """Return, per probe, the scores of the last rows; on a GPU they are waited for.

        Raises:
            UnscorableError: see `all`.
        """
        if self.failure is not None:
            raise self.failure
        return self._of_probes(self._between(self.n_scored - count, self.n_scored))

    def _between(self, start: int, stop: int) -> Float[Tensor, "rows scores"]:
        """Return the scores of some rows; parts are looked through from the last, since what is asked for is mostly new."""
        found, end = [torch.empty(0, self.stacked.width)], self.n_scored
        for part in reversed(self._parts):
            if end <= start:
                break
            begin = end - (part.stop - part.start)
            found.append(part.taken()[max(start - begin, 0) : max(stop - begin, 0)])
            end = begin
        return torch.cat(found[::-1])

    def _of_probes(self, scores: Float[Tensor, "rows scores"]) -> list[Float[Tensor, "rows outputs"]]:
        """Return each probe's part of scores.

        Raises:
            UnscorableError: if one is not a finite number.
        """
        found = [scores[:, columns] for columns in self.stacked.columns]
        if not scores.isfinite().all():
            (name, *_) = (s.name for s, one in zip(self.scorers, found, strict=True) if not one.isfinite().all())
            raise UnscorableError(f"the probe {name!r} gives a score that is not finite")
        return found


class _Cohort:
    """The requests of a forward that ask for the same probes, and what is found for them."""

    def __init__(self, stacked: StackedProbes) -> None:
        self.stacked = stacked
        self.spans: list[tuple[RequestScores, int, int]] = []
        self.selection = RowSelection()
        self.found: dict[Place, Float[Tensor, "wanted outputs"]] = {}

    def want(self, request: RequestScores, indices: range) -> None:
        """Score these flat indices for a request."""
        start = len(self.selection)
        self.selection.extend(indices)
        self.spans.append((request, start, len(self.selection)))

    def score(self, key: str, flat: Float[Tensor, "tokens width"]) -> None:
        """Score the wanted rows with all probes that read this key."""
        place = key, flat.shape[1]
        if (key_probes := self.stacked.by_key.get(place)) is not None:
            # Copied, since this is the model's own value; a difference of two dtypes would take ten times as long.
            rows = self.selection.of(flat).to(key_probes.mean.dtype, copy=True).sub_(key_probes.mean)
            self.found[place] = torch.addmm(key_probes.bias, rows, key_probes.weight)

    def hand_out(self, send: Callable[[Tensor], tuple[Tensor, torch.cuda.Event | None]]) -> None:
        """Give each request its scores.

        Args:
            send: brings them to the host, and says after which event they are there.
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
    """One forward's scores.

    Attributes:
        taps: per stored key, where to read in this forward.
    """

    def __init__(self, requests: list[RequestScores | None], layout: BatchLayout, memory: RowMemory) -> None:
        """Lay out which rows are scored by what.

        Args:
            requests: per batch row, the request's scores, None if it asks for none.
            layout: how the rows lie.
            memory: for what is sent to the host.
        """
        self._layout = layout
        self._memory = memory
        self.taps: dict[str, Tap] = {}
        cohorts: dict[StackedProbes, _Cohort] = {}
        self._of_key: dict[str, list[_Cohort]] = defaultdict(list)
        for row, request in enumerate(requests):
            if request is None:
                continue
            stacked = request.stacked
            if stacked not in cohorts:
                cohorts[stacked] = _Cohort(stacked)
                for scorer in request.scorers:
                    self.taps[scorer.key] = scorer.tap
                for key in dict.fromkeys(scorer.key for scorer in request.scorers):
                    self._of_key[key].append(cohorts[stacked])
            cohorts[stacked].want(request, layout.flat_indices(row, layout.spans[row]))
        self._cohorts = list(cohorts.values())

    def __call__(self, key: str, value: Float[Tensor, "rows width ..."]) -> None:
        """Score the wanted rows of one value; one that a probe cannot read is left out, and its requests fail."""
        flat = self._layout.flat(value)
        if flat is None or flat.ndim != 2:
            return
        for cohort in self._of_key[key]:
            cohort.score(key, flat)

    def fail(self, key: str, reason: str) -> None:
        """Take note that a key cannot be had: the requests whose probes read it fail, and no others."""
        for cohort in self._of_key[key]:
            for request, *_ in cohort.spans:
                request.fail(key, reason)

    def deliver(self) -> None:
        """Give each request its scores, once the forward has been issued."""
        for cohort in self._cohorts:
            cohort.hand_out(self._memory.to_host)
