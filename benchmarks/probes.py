"""The full sweep of a probe, layers × positions × strengths on grouped folds, against a loop over scikit-learn.

Both do the same: for every layer, position, fold and strength, standardise on the training part, fit a logistic regression
with an L2 penalty, and score the test part. The loop uses scikit-learn as its users do (`StandardScaler`,
`LogisticRegression` with its default solver and tolerance). Pairs are interleaved; before the timing, the scores of both are
compared at a tolerance at which scikit-learn has converged.

    python -m benchmarks.probes [--layers 28] [--positions 2] [--samples 400] [--width 1024] [--pairs 5] [--device cpu]
"""

import argparse
import time
import warnings

import numpy as np
import torch
from jaxtyping import Float
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from benchmarks.record import record, table
from benchmarks.statistics import ratios
from probes.evaluation import cross_validate
from probes.folds import Split, nested_folds
from probes.kinds import KINDS
from probes.labels import Target

KIND = KINDS["logistic"]


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


def loop(X: Float[Tensor, "models rows width"], y: np.ndarray, splits: list[Split], tolerance: float) -> np.ndarray:
    """Fit one probe after the other with scikit-learn; return the raw scores `[models, strengths, rows]`."""
    scores = np.empty((len(X), len(KIND.strengths), len(y)))
    for model, rows in enumerate(X.numpy()):
        for place, C in enumerate(KIND.strengths):
            for train, test in splits:
                scaler = StandardScaler().fit(rows[train])
                probe = LogisticRegression(C=C, tol=tolerance, max_iter=10_000).fit(
                    scaler.transform(rows[train]), y[train]
                )
                scores[model, place, test] = probe.decision_function(scaler.transform(rows[test]))
    return scores


def main() -> None:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in (("layers", 28), ("positions", 2), ("samples", 400), ("width", 1024), ("pairs", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    given = parser.parse_args()
    warnings.simplefilter("error", ConvergenceWarning)

    X, target = features(given.layers * given.positions, given.samples, given.width)
    rows = np.arange(given.samples)
    splits = [(fold.train, fold.test) for fold in nested_folds(target, rows)]

    def ours() -> np.ndarray:
        _, raw = cross_validate(X.to(given.device), target, rows, rows, splits, KIND)
        return raw[..., 0]

    part = slice(0, 2)
    exact = loop(X[part].double(), target.values, splits, 1e-9)
    difference = float(np.abs(exact - ours()[part]).max())
    seconds: dict[str, list[float]] = {"ours": [], "scikit-learn": []}
    for number in range(given.pairs):
        arms = [("ours", ours), ("scikit-learn", lambda: loop(X, target.values, splits, 1e-4))]
        for name, run in arms[:: -1 if number % 2 else 1]:
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
            print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)

    faster = ratios(seconds["scikit-learn"], seconds["ours"])
    fits = len(X) * len(KIND.strengths) * len(splits)
    body = [["all together", f"{np.median(seconds['ours']):.1f}", str(faster)]]
    body.append(["scikit-learn, one after the other", f"{np.median(seconds['scikit-learn']):.1f}", "1"])
    what = (
        f"{given.layers} layers × {given.positions} positions × {len(KIND.strengths)} strengths × {len(splits)} folds = {fits} "
        f"fits of {given.samples} samples × {given.width} features, on {given.device}; {given.pairs} interleaved pairs. "
        f"Largest difference of a score from scikit-learn's at tolerance 1e-9: {difference:.1e}."
    )
    record("Probes: the full sweep", f"{what}\n\n{table(['way', 'seconds', 'times faster (median, interval)'], body)}")


if __name__ == "__main__":
    main()
