from typing import Any

import numpy as np
import pytest

from probes.errors import OneClassError
from probes.folds import nested_folds, shuffle_labels
from probes.labels import Target


def target(y: Any) -> Target:
    return Target.of("label", list(y))


def test_folds_never_split_a_problem_and_are_stratified() -> None:
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 3)
    y = generator.random(120) < 0.3
    folds = nested_folds(target(y), groups)
    assert len(folds) == 5
    assert sorted(np.concatenate([fold.test for fold in folds])) == list(range(120))
    for fold in folds:
        assert not set(groups[fold.train]) & set(groups[fold.test])
        assert abs(y[fold.test].mean() - y.mean()) < 0.1
        assert len(fold.inner) == 3
        for train, test in fold.inner:
            assert not set(groups[fold.train][train]) & set(groups[fold.train][test])


def test_numbers_and_classes_are_split_by_problem_too() -> None:
    generator = np.random.default_rng(1)
    groups = np.repeat(np.arange(30), 2)
    for values in (generator.normal(size=60), [f"c{i}" for i in generator.integers(3, size=60)]):
        folds = nested_folds(target(values), groups)
        assert len(folds) == 5
        assert all(not set(groups[fold.train]) & set(groups[fold.test]) for fold in folds)


def test_fewer_folds_where_the_rarer_class_has_fewer_problems() -> None:
    y = np.array([True, True, True] + [False] * 20)
    folds = nested_folds(target(y), np.arange(23))
    assert len(folds) == 3
    assert all(len(fold.inner) == 2 for fold in folds)
    y[2] = False
    folds = nested_folds(target(y), np.arange(23))
    assert len(folds) == 2
    assert all(fold.inner == () for fold in folds)
    y[1] = False
    with pytest.raises(OneClassError, match=r"23 samples \(1 True\) of 23 problems cannot be split"):
        nested_folds(target(y), np.arange(23))


def test_shuffling_deals_the_labels_of_a_problem_together_and_within_its_fold() -> None:
    groups = np.repeat(np.random.default_rng(0).permutation(30), 2)
    y = np.repeat(np.arange(30) % 3, 2) + np.tile([0, 1], 30) > 1
    folds = nested_folds(target(y), groups)
    for seed in range(5):
        shuffled = shuffle_labels(target(y), groups, folds, seed).values
        assert 0.2 < np.mean(shuffled != y) < 0.6
        for fold in folds:
            before, after = ([tuple(v[groups == g]) for g in np.unique(groups[fold.test])] for v in (y, shuffled))
            assert sorted(before) == sorted(after)
