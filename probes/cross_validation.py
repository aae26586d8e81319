"""Scores of rows by probes that have not seen them: many cases of training on some rows and testing on others.

Folds differ in intercept and strength, so raw scores of different folds do not compare: pooled as they are, the AUROC would
partly rank folds, and the wrong way round, because a fold rich in one class leaves less of it for training. Each case's test
scores are therefore put in units of its training scores (their mean 0, their standard deviation 1). Numbers that are read
(R²) are in units of the target already.

Cases that are given together share what they can. A kind that fits problems together standardises by all rows that train
in any of them: beside the inner folds of an outer one, the outer training part. No row that an estimate is made on is among
them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.folds import RowIndices
from probes.kinds import Kind
from probes.labels import Target

AT_ONCE = {"cpu": 2**22, "cuda": 2**27}
"""Numbers of X that are fitted in one go: what stays near a processor, or fills a GPU."""

NO_SPREAD = 1e-12
"""Relative to 1 and their mean, the standard deviation of scores that are all the same."""


@dataclass(frozen=True)
class Case:
    """A label to learn on some rows, and the rows to test on."""

    target: Target
    """The label of all rows."""
    train: RowIndices
    """Rows to learn from."""
    test: RowIndices
    """Rows to score."""


@dataclass(frozen=True)
class Tested:
    """The scores of a case's test rows."""

    scores: Float[np.ndarray, "candidates strengths rows outputs"]
    """Comparable across cases, `[candidates, strengths, rows, outputs]`."""
    raw: Float[np.ndarray, "candidates strengths rows outputs"]
    """As the probes gave them: log-odds, values or logits."""


def cross_validate(
    X: Float[Tensor, "candidates rows ..."], cases: Sequence[Case], groups: Int[np.ndarray, "rows"], kind: Kind
) -> list[Tested]:
    """Fit a probe for every case, candidate and strength, and score each case's test rows."""
    parts = [
        [
            _tested(case, known, new)
            for case, (known, new) in zip(cases, _scores(part, cases, groups, kind), strict=True)
        ]
        for part in X.split(max(1, AT_ONCE[X.device.type] // X[0].numel()))
    ]
    return [
        Tested(np.concatenate([part.scores for part in found]), np.concatenate([part.raw for part in found]))
        for found in zip(*parts, strict=True)
    ]


def whole(
    cases: Sequence[Case], tested: Sequence[Tested], rows: int
) -> tuple[
    Float[np.ndarray, "candidates strengths rows outputs"], Float[np.ndarray, "candidates strengths rows outputs"]
]:
    """Put the scores of several cases' test rows in the rows' places, comparable ones and raw; NaN where none was tested."""
    candidates, strengths, _, outputs = tested[0].scores.shape
    scores, raw = np.full((2, candidates, strengths, rows, outputs), np.nan)
    for case, found in zip(cases, tested, strict=True):
        scores[:, :, case.test], raw[:, :, case.test] = found.scores, found.raw
    return scores, raw


Fitted = tuple[Float[Tensor, "models strengths outputs train"], Float[Tensor, "models strengths outputs test"]]


def _scores(
    X: Float[Tensor, "models rows ..."], cases: Sequence[Case], groups: Int[np.ndarray, "rows"], kind: Kind
) -> Iterator[Fitted]:
    """Return, per case, the scores of the rows that it trains and tests on."""
    strengths = torch.tensor(kind.strengths, dtype=torch.float64, device=X.device)

    def there(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(X.device)

    if kind.fit_together is None:
        for case in cases:
            known = X[:, there(case.train)]
            y, group = there(case.target.values[case.train]), there(groups[case.train])
            probes = kind.fit(known, y, group, strengths)
            yield probes.scores(known), probes.scores(X[:, there(case.test)])
        return
    rows = np.unique(np.concatenate([case.train for case in cases]))
    y = there(np.stack([case.target.values[rows] for case in cases]))
    trains = there(np.stack([np.isin(rows, case.train) for case in cases]))
    found = kind.fit_together(X[:, there(rows)], y, trains, strengths).scores(X).unflatten(1, (len(cases), -1))
    for scores, case in zip(found.unbind(1), cases, strict=True):
        yield scores[..., there(case.train)], scores[..., there(case.test)]


def _tested(case: Case, known: Tensor, new: Tensor) -> Tested:
    scaled = new
    if case.target.kind != "real":
        middle, spread = known.mean(-1, keepdim=True), known.std(-1, keepdim=True)
        # Scores that do not vary are 0: their spread is rounding, and dividing by it would rank the folds.
        varies = spread > NO_SPREAD * (1 + middle.abs())
        scaled = torch.where(varies, (new - middle) / torch.where(varies, spread, 1.0), 0.0)
    return Tested(scaled.mT.cpu().numpy(), new.mT.cpu().numpy())
