"""Cross-validation: scores of rows by probes that have not seen them, for many train/test cases at once.

Folds differ in intercept and strength, so raw scores of different folds are not comparable. Pooled without scaling, the
AUROC would partly rank folds, and in the wrong direction, because a fold rich in one class leaves fewer of its samples for
training. Each case's test scores are therefore standardized by its training scores (mean 0, standard deviation 1). Numeric
predictions (R²) are in the target's units already.

Cases that are passed together share computation. A kind that fits problems together standardizes by all rows that train in
any of the cases: with the inner folds of an outer one, that is the outer training part. It contains no row that an estimate
is made on.
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
"""Elements of X fitted at once: what fits a processor's caches, or fills a GPU."""

NO_SPREAD = 1e-12
"""Relative standard deviation below which scores count as constant."""


@dataclass(frozen=True)
class Case:
    """A label to learn on some rows, and rows to test on."""

    target: Target
    """The label of all rows."""
    train: RowIndices
    """Training rows."""
    test: RowIndices
    """Test rows."""


@dataclass(frozen=True)
class Tested:
    """The scores of a case's test rows."""

    scores: Float[np.ndarray, "candidates strengths rows outputs"]
    """Comparable across cases, `[candidates, strengths, rows, outputs]`."""
    raw: Float[np.ndarray, "candidates strengths rows outputs"]
    """Raw scores: log-odds, values or logits."""


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
    """Assemble the test scores of several cases by row, standardized and raw; NaN for rows that were not tested."""
    candidates, strengths, _, outputs = tested[0].scores.shape
    scores, raw = np.full((2, candidates, strengths, rows, outputs), np.nan)
    for case, found in zip(cases, tested, strict=True):
        scores[:, :, case.test], raw[:, :, case.test] = found.scores, found.raw
    return scores, raw


Fitted = tuple[Float[Tensor, "models strengths outputs train"], Float[Tensor, "models strengths outputs test"]]


def _scores(
    X: Float[Tensor, "models rows ..."], cases: Sequence[Case], groups: Int[np.ndarray, "rows"], kind: Kind
) -> Iterator[Fitted]:
    """Yield, per case, the scores of its training and test rows."""
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
        # Constant scores become 0: their spread is rounding error, and dividing by it would rank the folds.
        varies = spread > NO_SPREAD * (1 + middle.abs())
        scaled = torch.where(varies, (new - middle) / torch.where(varies, spread, 1.0), 0.0)
    return Tested(scaled.mT.cpu().numpy(), new.mT.cpu().numpy())
