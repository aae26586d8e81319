"""From stored activations to probes: can the label be read from the model's inside, where, and beyond chance?

What flows through here: `dataset` joins the samples of runs and sessions to their stored rows (X, and which problem each row
belongs to), `labels` says what is to be read from them (y) and `positions` where; `kinds` fit one probe per layer, all
layers together; `evaluation` says honestly how well they do (nested `folds` that never split a problem, `metrics` with
`intervals`, `baselines`); `train` does this for every stored key and writes `RUN/probes/<label>/`; `transfer` carries probes
to other data and compares their directions; `report` is what was found, `plots` and `console` show it. It reads files only:
no server, no Ray, no GPU needed.

A new probe kind is one file in `kinds` and a line where they are listed, or a user's own function (`choosing`); a new label is
one line in `labels.LABELS`.
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
