"""Does a probe's direction do anything? Problems are answered with the direction added to the stream, at several scales.

`arms` makes what is compared: no steering, the probe's direction, and directions of the same length that know nothing of
the label. `sweep` has a server answer every problem in every arm. `findings` turns the answers into accuracy, parse rate and
length, each with its interval and its difference from no steering.
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
