"""Scores the rows of a running batch with probes, while the model runs.

A probe reads one hook point. Per forward, `StepScores` gathers the rows of all requests that ask for a probe and scores them
in one product; what is kept of a row is its score. Every token that passes through the model is scored: those of the prompt,
and those generated but the last, which never does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from serve_app.capture.grid import Layout
from serve_app.capture.structure import Tap
from serve_app.errors import RequestError

if TYPE_CHECKING:
    # Only a type here: importing it brings the store with it, and pyarrow.
    from roentgen.linear_probe import Readout, ScoreUnit


class UnscorableError(RequestError):
    """A request's probe cannot read its hook point, so what it asked for cannot be told; the message names both."""

    param, prefix = "probes", "probes: "


@dataclass(frozen=True, eq=False)
class Scorer:
    """A probe that a request asks for."""

    name: str
    """What the reply calls it."""
    key: str
    """The stored key it reads."""
    tap: Tap
    """Where that is."""
    readout: "Readout"
    """The probe's arithmetic, on the model's device."""
    label: str
    """What it reads."""
    classes: tuple[str, ...] = ()
    """Names of its outputs, where they have names."""
    unit: "ScoreUnit" = "score"
    """What its scores are, see `ProbeCard`."""


@dataclass(frozen=True)
class NewScores:
    """A request's scores that have come since the last time, on the CPU."""

    fed: int
    """Tokens that they are of."""
    parts: list[Float[Tensor, "rows outputs"] | None]
    """Per probe; None where its hook point gave nothing that it can read."""
    failure: UnscorableError | None
    """Why there can be none, if that is known."""


class RequestScores:
    """The scores of one running request, probe by probe."""

    def __init__(self, scorers: tuple[Scorer, ...]) -> None:
        """Begin before the first token."""
        self.scorers = scorers
        self._parts: list[list[Tensor]] = [[] for _ in scorers]
        self._fed = self._taken = 0
        self.failure: UnscorableError | None = None

    @property
    def fed(self) -> int:
        """Tokens that have been scored."""
        return self._fed

    def feed(self, length: int) -> None:
        """Count the tokens of a forward."""
        self._fed += length

    def add(self, number: int, scores: Float[Tensor, "rows outputs"]) -> None:
        """Take one probe's scores of the next rows."""
        self._parts[number].append(scores)

    def resume(self, length: int, rows: Mapping[Tap, Float[Tensor, "rows ..."]]) -> None:
        """Begin behind tokens whose rows are known, and score these.

        Args:
            length: how many.
            rows: theirs, by where they were read.
        """
        self.feed(length)
        for number, scorer in enumerate(self.scorers):
            known, readout = rows[scorer.tap], scorer.readout
            if known.ndim == 2 and readout.mean.shape[0] == known.shape[1]:
                # A forward may have scored the tokens behind them already.
                self._parts[number].insert(0, readout.scores(known.to(readout.mean.device)).cpu())

    def drain(self) -> "NewScores":
        """Return what has come since the last time, and keep none of it."""
        parts = [torch.cat(parts).cpu() if parts else None for parts in self._parts]
        new = NewScores(self._fed, parts, self.failure)
        self._parts, self._fed = [[] for _ in self.scorers], 0
        return new

    def take_in(self, new: "NewScores") -> None:
        """Take what `drain` has given elsewhere."""
        self.feed(new.fed)
        self.failure = self.failure or new.failure
        for number, part in enumerate(new.parts):
            if part is not None:
                self.add(number, part)

    def begin_again(self) -> None:
        """Forget all scores; what has been taken is not given a second time."""
        self._parts = [[] for _ in self.scorers]
        self._fed = 0

    def take(self) -> list[Float[Tensor, "rows outputs"]]:
        """Return, per probe, the scores that have come since the last time.

        Raises:
            UnscorableError: if a probe's hook point gives no row per token, of the width that the probe reads.
        """
        start, self._taken = self._taken, self._fed
        return [scores[start:] for scores in self.all()]

    def all(self) -> list[Float[Tensor, "rows outputs"]]:
        """Return the scores of all rows so far, per probe.

        Raises:
            UnscorableError: see `take`; or if a score is not a finite number.
        """
        if self.failure is not None:
            raise self.failure
        self._parts = [[torch.cat(parts)] if parts else [] for parts in self._parts]
        for scorer, parts in zip(self.scorers, self._parts, strict=True):
            if not parts or len(parts[0]) != self._fed:
                width = scorer.readout.mean.shape[0]
                raise UnscorableError(
                    f"{scorer.key} does not give a row of {width} per token, which the probe {scorer.name!r} reads"
                )
            if not parts[0].isfinite().all():
                raise UnscorableError(f"the probe {scorer.name!r} gives a score that is not finite")
        return [parts[0] for parts in self._parts]


class StepScores:
    """One forward's scores.

    Attributes:
        taps: per stored key, where to read in this forward.
    """

    def __init__(self, requests: list[RequestScores | None], grid: Layout) -> None:
        """Lay out which rows are scored by what.

        Args:
            requests: per batch row, the request's scores, None if it asks for none.
            grid: how the rows lie.
        """
        self._grid = grid
        self.taps: dict[str, Tap] = {}
        self._lengths: list[tuple[RequestScores, int]] = []
        self._asked: dict[str, dict[int, list[tuple[RequestScores, int, range]]]] = {}
        self._found: list[tuple[Tensor, list[tuple[RequestScores, int, range]]]] = []
        for row, request in enumerate(requests):
            if request is None:
                continue
            self._lengths.append((request, len(grid.spans[row])))
            places = grid.places(row, grid.spans[row])
            for number, scorer in enumerate(request.scorers):
                self.taps[scorer.key] = scorer.tap
                # Requests with one probe are scored together: a probe that is loaded once is one object.
                same = self._asked.setdefault(scorer.key, {}).setdefault(id(scorer.readout), [])
                same.append((request, number, places))

    def __call__(self, key: str, value: Float[Tensor, "rows width ..."]) -> None:
        """Score the wanted rows of one value; one that a probe cannot read is left out, and said when its request ends."""
        flat = self._grid.flat(value)
        if flat is None or flat.ndim != 2:
            return
        for asked in self._asked[key].values():
            request, number, _ = asked[0]
            readout = request.scorers[number].readout
            if readout.mean.shape[0] == flat.shape[1]:
                places = torch.tensor([place for *_, places in asked for place in places], device=flat.device)
                self._found.append((readout.scores(flat[places]), asked))

    def fail(self, key: str, reason: str) -> None:
        """Take note that a key cannot be had: the requests whose probes read it fail, and no others."""
        for asked in self._asked[key].values():
            for request, number, _ in asked:
                request.failure = UnscorableError(f"{reason}, which the probe {request.scorers[number].name!r} reads")

    def deliver(self, *, wait: bool = True) -> None:
        """Give each request its scores, once the forward has been issued.

        Args:
            wait: until they are there; otherwise they stay on the model's device.
        """
        for request, length in self._lengths:
            request.feed(length)
        for scores, asked in self._found:
            parts = (scores.cpu() if wait else scores).split([len(places) for *_, places in asked])
            for (request, number, _), part in zip(asked, parts, strict=True):
                request.add(number, part)
