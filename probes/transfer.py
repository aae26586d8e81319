"""Transfer of probes: trained on one dataset and tested on another, and the similarity of two directions.

The test problems took no part in training, so the bootstrap over them needs no widening. Problems in both datasets are
split: half of them, chosen at random, train and the other half are tested, so that, for example, a run with tools can be
compared with one without on the same problems. Examples that share a question or a template count as one problem.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from probes.bootstrap import bootstrap_weights
from probes.choosing import Fit, choose_kind
from probes.cross_validation import Case, cross_validate, whole
from probes.dataset import ProbeDataset
from probes.errors import OneClassError, ProbeDataError
from probes.evaluation import choose_strength, main_estimate
from probes.fitting import check_reads, check_seed
from probes.folds import NEEDS_CONTRASTS, SAMPLE_AGAIN, grouped_splits, mixed
from probes.kinds import Kind
from probes.kinds.linear import LinearProbes
from probes.labels import Target
from probes.report import Estimate
from probes.sources import SourcePath
from roentgen.runs import same_template

INNER_FOLDS = 3


@dataclass(frozen=True)
class KeyComparison:
    """Comparison of two datasets at one key."""

    key: str
    """The stored key."""
    cosine: float
    """Cosine of the two probes' directions, each fitted on all of its own data, in the activations' own units."""
    there: Estimate
    """Metric when trained on the first and tested on the second."""
    back: Estimate
    """Metric when trained on the second and tested on the first."""


@dataclass(frozen=True)
class ProbeComparison:
    """Comparison of two datasets, key by key."""

    names: tuple[str, str]
    """Names of the datasets."""
    label: str
    """The label."""
    kind: str
    """The kind of probe."""
    positions: str
    """Where."""
    keys: tuple[KeyComparison, ...]
    """Results per key that both have."""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


def transfer(
    train: ProbeDataset,
    test: ProbeDataset,
    keys: list[str],
    positions: str = "last_prompt",
    kind: str | Kind | Fit | None = None,
    seed: int = 0,
) -> list[Estimate]:
    """Train on one dataset and test on another, separately per key; the strength is chosen on the training side.

    Args:
        train: the training data; problems that `test` has too are assigned to one side or the other.
        test: the test data.
        keys: stored keys that both have.
        positions: where to read.
        kind: of probe.
        seed: of folds, deals and bootstrap.

    Raises:
        ProbeDataError: if the datasets' targets differ.
        OneClassError: if a side has only one class left.
    """
    chosen = choose_kind(train.target, kind)
    check_reads(chosen, [positions])
    check_seed(seed)
    if (train.target.kind, train.target.classes) != (test.target.kind, test.target.classes):
        raise ProbeDataError(f"{train.target.name} and {test.target.name} are not the same kind of label")
    learn, judge = _split_shared_problems(train, test, seed)
    if chosen.within:
        for data, kept, side in ((train, learn, "to train on"), (test, judge, "to test on")):
            if not mixed(data.target.values[kept], data.problems[kept]).any():
                raise OneClassError(f"{data.names[0]} has no {NEEDS_CONTRASTS} left {side}; {SAMPLE_AGAIN}")
    target = _part(test.target, judge)
    groups, problems = (np.unique(part[judge], return_inverse=True)[1] for part in (test.groups, test.problems))
    weights = bootstrap_weights(groups, seed)
    found = []
    for key in keys:
        X = train.features(key, positions)[None]
        probes = _fit(X, train, np.flatnonzero(learn), chosen, seed)
        scores = probes.scores(test.features(key, positions)[None][:, torch.from_numpy(judge)])[0, 0].mT.numpy()
        found.append(main_estimate(scores, target, problems, weights, within=chosen.within, widening=1.0))
    return found


def compare(
    first: SourcePath,
    second: SourcePath,
    label: str = "correct",
    positions: str = "last_prompt",
    kind: str | Kind | Fit | None = None,
    seed: int = 0,
    table: SourcePath | None = None,
) -> ProbeComparison:
    """Compare two runs or sessions key by key: transfer both ways, and the cosine between the directions.

    Args:
        first: a run directory or session.
        second: another.
        label: what to read in each.
        positions: where to read.
        kind: of probe.
        seed: of folds, deals and bootstrap.
        table: labels, as CSV or parquet.

    Raises:
        RunError: if a run is damaged.
        ProbeDataError: if they have no key in common, or requested data does not exist.
        OneClassError: if the label does not vary enough in one of them.
    """
    one, two = (ProbeDataset.open(place, label, table=table) for place in (first, second))
    keys = [key for key in one.keys if key in two.keys]
    if not keys:
        raise ProbeDataError(f"{first} and {second} have no stored key in common")
    chosen = choose_kind(one.target, kind)
    if chosen.tokens:
        raise ProbeDataError(f"kind: {chosen.name!r} has no direction to compare")
    there = transfer(one, two, keys, positions, chosen, seed)
    back = transfer(two, one, keys, positions, chosen, seed)
    cosines = [_cosine(one, two, key, positions, chosen, seed) for key in keys]
    return ProbeComparison(
        (one.names[0], two.names[0]), label, chosen.name, positions,
        tuple(KeyComparison(*parts) for parts in zip(keys, cosines, there, back, strict=True)),
    )  # fmt: skip


def _cosine(one: ProbeDataset, two: ProbeDataset, key: str, positions: str, kind: Kind, seed: int) -> float:
    """Return the cosine of two datasets' directions, each fitted on all of its data."""
    directions = [_direction(data, key, positions, kind, seed) for data in (one, two)]
    return float(torch.nn.functional.cosine_similarity(directions[0].flatten(), directions[1].flatten(), dim=0))


def _direction(data: ProbeDataset, key: str, positions: str, kind: Kind, seed: int) -> Float[Tensor, "outputs d"]:
    probes = _fit(data.features(key, positions)[None], data, np.arange(len(data.groups)), kind, seed)
    if not isinstance(probes, LinearProbes):
        raise ProbeDataError(f"kind: {kind.name!r} has no direction to compare")
    return probes.weight[0, 0] / probes.scale[0]


def _fit(X: Float[Tensor, "1 rows d"], data: ProbeDataset, rows: np.ndarray, kind: Kind, seed: int) -> Any:
    """Fit one probe on some rows, with its strength chosen on folds of them."""
    contrasts = mixed(data.target.values, data.problems) if kind.within else None
    splits = grouped_splits(data.target, rows, data.groups, INNER_FOLDS, seed, contrasts)
    strength = kind.strengths[0]
    if splits and len(kind.strengths) > 1:
        cases = [Case(data.target, rows[train], rows[test]) for train, test in splits]
        inside, raw = whole(cases, cross_validate(X, cases, data.problems, kind), len(data.groups))
        chosen = choose_strength(inside[:, :, rows], raw[:, :, rows], data.target, data.problems, rows, kind)
        strength = kind.strengths[int(chosen[0])]
    kept = torch.from_numpy(rows)
    y, groups = torch.from_numpy(data.target.values)[kept], torch.from_numpy(data.problems)[kept]
    return kind.fit(X[:, kept], y, groups, torch.tensor([strength], dtype=torch.float64))


def _split_shared_problems(
    train: ProbeDataset, test: ProbeDataset, seed: int
) -> tuple[Bool[np.ndarray, "train"], Bool[np.ndarray, "test"]]:
    """Return which examples train and which are tested, so that no problem is on both sides."""
    groups = np.array(same_template([example.posed for data in (train, test) for example in data.examples]))
    of_train, of_test = groups[: len(train.examples)], groups[len(train.examples) :]
    shared = np.intersect1d(of_train, of_test)
    taught = np.random.default_rng(seed).permutation(shared)[: len(shared) // 2]
    learn = ~np.isin(of_train, np.setdiff1d(shared, taught))
    judge = ~np.isin(of_test, taught)
    for data, kept, side in ((train, learn, "to train on"), (test, judge, "to test on")):
        if len(np.unique(data.target.values[kept])) < 2:
            raise OneClassError(f"{data.names[0]} has only one class left {side}; evaluate more problems")
    return learn, judge


def _part(target: Target, rows: np.ndarray) -> Target:
    return Target(target.name, target.kind, target.values[rows], target.classes)
