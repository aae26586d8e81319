"""Trains probes on stored activations: can a label be read from the model's internal state, at which layer, and better than
chance?

`dataset` joins the samples of runs and sessions to their stored rows (X, and the problem of each row), `labels` defines
what to predict (y), and `positions` where to read. `kinds` fit one probe per layer, all layers together. `evaluation`
estimates how well they generalize: nested `folds` that never split a problem, `metrics` with intervals from the
`bootstrap`, and `baselines`. `train` does this for every stored key and writes `RUN/probes/<label>/`. `transfer` tests
probes on other data and compares their directions. `report` holds the results; `plots` and `terminal_report` show them. The
package reads files only: it needs no server, no Ray and no GPU.

A new probe kind is one file in `kinds` and one line in its list, or a user's own function (`choosing`). A new label is one
line in `labels.LABELS`.
"""

from probes.dataset import ProbeDataset
from probes.errors import OneClassError, ProbeDataError
from probes.labels import LABELS
from probes.report import Best, Estimate, KeyResult, ProbeReport
from probes.terminal_report import render
from probes.train import train
from probes.transfer import ProbeComparison, compare, transfer

__all__ = [
    "LABELS",
    "Best",
    "Estimate",
    "KeyResult",
    "OneClassError",
    "ProbeComparison",
    "ProbeDataError",
    "ProbeDataset",
    "ProbeReport",
    "compare",
    "render",
    "train",
    "transfer",
]
