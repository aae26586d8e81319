"""Steering sweeps: problems are answered while a probe's direction is added to the residual stream, at several scales.

`arms` defines the conditions: no steering, the probe's direction, and control directions of the same length that are
independent of the label. `sweep` has a server answer every problem in every arm. `findings` computes accuracy, parse rate
and length, each with its interval and its difference from no steering.
"""

from probes.steering.arms import Arm, make_arms
from probes.steering.findings import SweepReport, summarize_sweep
from probes.steering.sweep import SweepError, SweepOutcome, SweepPlan, SweepTask, run_sweep

__all__ = [
    "Arm",
    "SweepError",
    "SweepOutcome",
    "SweepPlan",
    "SweepReport",
    "SweepTask",
    "make_arms",
    "run_sweep",
    "summarize_sweep",
]
