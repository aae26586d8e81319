"""The full nested sweep of a probe with its shuffled control, compared with a loop over scikit-learn.

Both perform the same computation for every layer and position: five outer folds, three inner ones in the training part of
each, every strength fitted on all of them, the strength chosen by inner AUROC and evaluated outside; and all of it again on
shuffled labels. Both standardize once per outer training part. The loop uses scikit-learn as its users do: `StandardScaler`
and `LogisticRegression` with its default solver, at its default tolerance and at the tolerance where its scores are about
as exact as ours. It fits one model after the other, so it is timed on some of the layers and positions, and seconds are per
layer and position. Pairs are interleaved.

    python -m benchmarks.probes [--layers 30] [--positions 3] [--samples 400] [--width 1024] [--pairs 5] [--device cpu]
"""

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from benchmarks.paired_statistics import ratios
from benchmarks.results_file import record, table
from probes.cross_validation import Case, cross_validate
from probes.evaluation import evaluate
from probes.folds import Fold, nested_folds, shuffle_labels
from probes.kinds import KINDS
from probes.labels import Target

KIND = KINDS["logistic"]
TOLERANCES = (1e-4, 1e-6)
LOOPED = 2
"""Layers and positions that the loop is timed on."""


def features(models: int, rows: int, width: int) -> tuple[Float[Tensor, "models rows width"], Target]:
    """Make features like a residual stream's: correlated, a few directions much larger, the label faintly in them."""
    generator = torch.Generator().manual_seed(0)
    y = torch.rand(rows, generator=generator) < 0.5
    X = torch.randn(models, rows, width, generator=generator)
    for model in range(models):  # one mixing matrix at a time: together they would take more memory than the features
        mixing = torch.randn(width, width, generator=generator) / torch.arange(1, width + 1).sqrt()[:, None]
        X[model] = X[model] @ mixing
    X[..., 0] += 0.5 * y
    X[..., 1] *= 1000
    return X, Target("label", "binary", y.numpy())


def loop(X: np.ndarray, targets: list[Target], folds: tuple[Fold, ...], tolerance: float) -> None:
    """Do the sweep with scikit-learn, one fit after the other."""
    for rows in X:
        for target in targets:
            for fold in folds:
                scaler = StandardScaler().fit(rows[fold.train])
                train, test = scaler.transform(rows[fold.train]), scaler.transform(rows[fold.test])
                y = target.values[fold.train]
                found = []
                for C in KIND.strengths:
                    inside = np.empty(len(y))
                    for own, other in fold.inner:
                        probe = LogisticRegression(C=C, tol=tolerance, max_iter=10_000).fit(train[own], y[own])
                        inside[other] = probe.decision_function(train[other])
                    probe = LogisticRegression(C=C, tol=tolerance, max_iter=10_000).fit(train, y)
                    found.append((roc_auc_score(y, inside), probe.decision_function(test)))
                max(found, key=lambda pair: pair[0])


def difference(X: Float[Tensor, "rows width"], target: Target, fold: Fold, tolerance: float | None) -> float:
    """Return how far scores of test rows are, at most, from what scikit-learn converges to: its own, or ours if None."""
    scaler = StandardScaler().fit(X[fold.train].double().numpy())

    def scores(rows: np.ndarray, C: float, tolerance: float) -> np.ndarray:
        probe = LogisticRegression(C=C, tol=tolerance, max_iter=10_000)
        probe.fit(rows[fold.train], target.values[fold.train])
        found: np.ndarray = probe.decision_function(rows[fold.test])
        return found

    exact = np.stack([scores(scaler.transform(X.double().numpy()), C, 1e-9) for C in KIND.strengths])
    if tolerance is None:
        (tested,) = cross_validate(X[None], [Case(target, fold.train, fold.test)], np.arange(len(X)), KIND)
        found = tested.raw[0, :, :, 0]
    else:
        single = scaler.transform(X.double().numpy()).astype(np.float32)  # what stored activations are
        found = np.stack([scores(single, C, tolerance) for C in KIND.strengths])
    return float(np.abs(exact - found).max())


def main() -> None:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in (("layers", 30), ("positions", 3), ("samples", 400), ("width", 1024), ("pairs", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    given = parser.parse_args()
    warnings.simplefilter("error", ConvergenceWarning)

    X, target = features(given.layers * given.positions, given.samples, given.width)
    groups = np.arange(given.samples)
    folds = nested_folds(target, groups)
    targets = [target, shuffle_labels(target, groups, folds)]
    ways: dict[str, tuple[int, Callable[[], object]]] = {
        "all together": (len(X), lambda: evaluate(X.to(given.device), targets, groups, folds, KIND))
    }
    for tolerance in TOLERANCES:
        ways[f"scikit-learn, tolerance {tolerance:g}"] = (
            LOOPED, partial(loop, X[:LOOPED].numpy(), targets, folds, tolerance),
        )  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(given.pairs):
        for name, (models, run) in list(ways.items())[:: -1 if number % 2 else 1]:
            start = time.perf_counter()
            run()
            seconds[name].append((time.perf_counter() - start) / models)
            print(f"{name}: {seconds[name][-1]:.3f} s per layer and position", flush=True)

    off = [difference(X[0], target, folds[0], tolerance) for tolerance in (None, *TOLERANCES)]
    body: list[list[str]] = []
    for (name, times), error in zip(seconds.items(), off, strict=True):
        faster = "1" if not body else str(ratios(times, seconds["all together"]))
        body.append([name, f"{np.median(times):.3f}", faster, f"{error:.0e}"])
    splits = sum(1 + len(fold.inner) for fold in folds)
    fits = len(X) * len(KIND.strengths) * splits * len(targets)
    what = (
        f"{given.layers} layers × {given.positions} positions × {len(KIND.strengths)} strengths × {splits} folds, inner ones "
        f"included, × the label and a shuffled one = {fits} fits of {given.samples} samples × {given.width} features, on "
        f"{given.device}; {given.pairs} interleaved pairs, the loop over {LOOPED} of the {len(X)} layers and positions. "
        "The last column is the largest difference of a score from scikit-learn's in float64 at tolerance 1e-9."
    )
    head = ["way", "seconds per layer and position", "takes so many times as long (median, interval)", "off by"]
    record("Probes: the full sweep", f"{what}\n\n{table(head, body)}")


if __name__ == "__main__":
    main()
