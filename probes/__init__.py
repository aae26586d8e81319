"""From stored activations to probes: can the label be read from the model's inside, where, and beyond chance?

What flows through here: `dataset` joins a run's samples to their stored rows (X, y, and which problem each row
belongs to); `logistic` fits one probe per layer, all layers together; `evaluation` says honestly how well they do
(nested folds that never split a problem, intervals, baselines); `train` does this for every stored key and writes
`RUN/probes/<label>/`; `report` is what it found, `plots` and `console` show it. It reads files only: no server, no
Ray, no GPU.

A new probe kind is one file beside `logistic`; a new label is one line in `dataset.LABELS`.
"""

from probes.console import render
from probes.dataset import LABELS, OneClassError, ProbeDataError, ProbeDataset
from probes.report import Best, Estimate, KeyResult, ProbeReport
from probes.train import train

__all__ = [
    "LABELS",
    "Best",
    "Estimate",
    "KeyResult",
    "OneClassError",
    "ProbeDataError",
    "ProbeDataset",
    "ProbeReport",
    "render",
    "train",
]
