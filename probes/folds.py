"""Splits that keep problems together, and shuffled labels that do so too.

Outer folds split *problems*, stratified by label; inside the training part of each, inner folds of the same kind make all
choices. A numeric label is stratified by its quintiles.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, Shaped
from sklearn.model_selection import StratifiedGroupKFold

from probes.errors import OneClassError
from probes.labels import Target

OUTER_FOLDS = 5
INNER_FOLDS = 3
NEEDS_CONTRASTS = "problems with attempts of both classes"
SAMPLE_AGAIN = "sample each problem several times (--epochs 4 --temperature 0.7), or choose another --kind"
UNNEEDED = -1
"""Stratum of rows that training does not need."""

RowIndices = Int[np.ndarray, "part"]
Split = tuple[RowIndices, RowIndices]


@dataclass(frozen=True)
class Fold:
    """One outer fold."""

    train: RowIndices
    """Training rows."""
    test: RowIndices
    """Test rows."""
    inner: tuple[Split, ...]
    """Splits of the training part, as indices into `train`; empty if its rarest class has a single problem."""


def strata(target: Target) -> Int[np.ndarray, "rows"]:
    """Return the strata of the folds: the class, or the quintile of a number."""
    if target.kind == "real":
        edges = np.unique(np.quantile(target.values, [0.2, 0.4, 0.6, 0.8]))
        quintiles: np.ndarray = np.digitize(target.values, edges)
        return quintiles
    return target.values.astype(np.int64)


def mixed(y: Shaped[np.ndarray, "rows"], problems: Int[np.ndarray, "rows"]) -> Bool[np.ndarray, "rows"]:
    """Return which rows belong to problems with rows of both classes."""
    return np.isin(problems, np.intersect1d(problems[y.astype(bool)], problems[~y.astype(bool)]))


def grouped_splits(
    target: Target,
    rows: RowIndices,
    groups: Int[np.ndarray, "samples"],
    most: int,
    seed: int,
    needed: Bool[np.ndarray, "samples"] | None = None,
) -> tuple[Split, ...]:
    """Split rows into (train, test) parts that share no group; parts are indices into `rows`.

    There are `most` splits, or fewer if the rarest class has fewer problems, so that every training part has every class
    (counting only needed rows); none if no such split exists.
    """
    own, labels = groups[rows], strata(target)[rows]
    if needed is not None:
        labels = np.where(needed[rows], labels, UNNEEDED)
    present = np.unique(labels[labels != UNNEEDED])
    problems = len(np.unique(own))
    if not len(present):
        return ()
    if target.kind != "real":
        problems = min(len(np.unique(own[labels == label])) for label in present)
    for k in range(min(most, problems), 1, -1):
        if target.kind == "real" and k > np.bincount(labels).max():  # too few samples for quintiles
            labels = np.zeros_like(labels)
        folds = StratifiedGroupKFold(k, shuffle=True, random_state=seed)
        splits = tuple((train, test) for train, test in folds.split(labels, labels, own) if len(test))
        if target.kind == "real" or all(np.isin(present, labels[train]).all() for train, _ in splits):
            return splits
    return ()


def nested_folds(
    target: Target,
    groups: Int[np.ndarray, "samples"],
    seed: int = 0,
    contrasts: Bool[np.ndarray, "samples"] | None = None,
) -> tuple[Fold, ...]:
    """Create the outer folds and, inside each, the inner ones.

    Args:
        target: the label.
        groups: the group of each sample, which is kept together.
        seed: seed of the folds.
        contrasts: which samples belong to problems with attempts of both classes, for a kind that learns only from those.

    Raises:
        OneClassError: if no split by problem leaves every class in the training part.
    """
    if contrasts is not None and len(np.unique(groups[contrasts])) < 2:
        found = "none has" if not contrasts.any() else "one has, and a probe is tested on problems that it has not seen"
        raise OneClassError(
            f"kind: 'contrast' needs at least two {NEEDS_CONTRASTS} ({target.name!r}); of the {len(np.unique(groups))} here "
            f"{found}; {SAMPLE_AGAIN}"
        )
    outer = grouped_splits(target, np.arange(len(groups)), groups, OUTER_FOLDS, seed, contrasts)
    if not outer:
        counts = f" ({int(target.values.sum())} True)" if target.kind == "binary" else ""
        left = "there is something to train on" if target.kind == "real" else "both classes are left to train on"
        raise OneClassError(
            f"{len(groups)} samples{counts} of {len(np.unique(groups))} problems cannot be split by problem "
            f"so that {left}; evaluate more problems"
        )
    return tuple(
        Fold(train, test, grouped_splits(target, train, groups, INNER_FOLDS, seed, contrasts)) for train, test in outer
    )


def shuffle_labels(
    target: Target, groups: Int[np.ndarray, "samples"], folds: Sequence[Fold], seed: int = 0, *, inside: bool = False
) -> Target:
    """Permute the labels of whole problems within each outer fold, so that only chance remains to be found.

    A problem's labels stay together if problems have equally many samples. The class counts of every fold are preserved, as in
    the stratified folds of the original labels. With `inside`, labels are permuted among the attempts at each problem instead,
    which is the chance level of a comparison within problems.
    """
    generator = np.random.default_rng(seed)
    values = target.values.copy()
    if inside:
        order = np.lexsort((generator.random(len(groups)), groups))
        values[np.argsort(groups, kind="stable")] = target.values[order]
        return Target(target.name, target.kind, values, target.classes)
    for fold in folds:
        own = groups[fold.test]
        dealt = generator.permutation(int(groups.max()) + 1)
        values[fold.test[np.argsort(own, kind="stable")]] = target.values[
            fold.test[np.argsort(dealt[own], kind="stable")]
        ]
    return Target(target.name, target.kind, values, target.classes)
