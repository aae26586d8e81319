"""Splits that never part a problem, and labels dealt anew that never part one either.

Outer folds split *problems*, stratified by label; inside the training part of each, inner folds of the same kind choose
whatever is to be chosen. For a number, the strata are its quintiles.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from sklearn.model_selection import StratifiedGroupKFold

from probes.errors import OneClassError
from probes.labels import Target

OUTER_FOLDS = 5
INNER_FOLDS = 3

Rows = Int[np.ndarray, "part"]
Split = tuple[Rows, Rows]


@dataclass(frozen=True)
class Fold:
    """One outer fold.

    Attributes:
        train: its training rows.
        test: its test rows.
        inner: splits of the training part, as indices into `train`; empty if its rarest class has a single problem.
    """

    train: Rows
    test: Rows
    inner: tuple[Split, ...]


def strata(target: Target) -> Int[np.ndarray, "rows"]:
    """Return what folds are stratified by: the class, or the quintile of a number."""
    if target.kind == "real":
        edges = np.unique(np.quantile(target.values, [0.2, 0.4, 0.6, 0.8]))
        return np.digitize(target.values, edges)
    return target.values.astype(np.int64)


def grouped_splits(
    target: Target, rows: Rows, groups: Int[np.ndarray, "samples"], most: int, seed: int
) -> tuple[Split, ...]:
    """Split some rows into (train, test) parts, as indices into them, that share no group.

    There are `most` splits, or fewer where the rarest class has fewer problems, so that every training part has every class;
    none if that leaves no way to split.
    """
    own, labels = groups[rows], strata(target)[rows]
    present = np.unique(labels)
    problems = len(np.unique(own))
    if target.kind != "real":
        problems = min(len(np.unique(own[labels == label])) for label in present)
    for k in range(min(most, problems), 1, -1):
        folds = StratifiedGroupKFold(k, shuffle=True, random_state=seed)
        splits = tuple((train, test) for train, test in folds.split(labels, labels, own) if len(test))
        if target.kind == "real" or all(len(np.unique(labels[train])) == len(present) for train, _ in splits):
            return splits
    return ()


def nested_folds(target: Target, groups: Int[np.ndarray, "samples"], seed: int = 0) -> tuple[Fold, ...]:
    """Make the outer folds and, inside each, the inner ones.

    Raises:
        OneClassError: if no split by problem leaves every class to train on.
    """
    outer = grouped_splits(target, np.arange(len(groups)), groups, OUTER_FOLDS, seed)
    if not outer:
        counts = f" ({int(target.values.sum())} True)" if target.kind == "binary" else ""
        raise OneClassError(
            f"{len(groups)} samples{counts} of {len(np.unique(groups))} problems cannot be split by problem "
            "so that both classes are left to train on; evaluate more problems"
        )
    return tuple(Fold(train, test, grouped_splits(target, train, groups, INNER_FOLDS, seed)) for train, test in outer)


def shuffle_labels(target: Target, groups: Int[np.ndarray, "samples"], folds: Sequence[Fold], seed: int = 0) -> Target:
    """Deal each problem's labels, as a block, to another problem of the same outer fold: what is left to find is chance.

    Blocks stay whole where problems have equally many samples. The number of each class stays what it is in every fold, as
    it does in the stratified folds of the labels themselves.
    """
    generator = np.random.default_rng(seed)
    values = target.values.copy()
    for fold in folds:
        own = groups[fold.test]
        dealt = generator.permutation(int(groups.max()) + 1)
        values[fold.test[np.argsort(own, kind="stable")]] = target.values[
            fold.test[np.argsort(dealt[own], kind="stable")]
        ]
    return Target(target.name, target.kind, values, target.classes)
