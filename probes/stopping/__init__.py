"""Stopping sweeps: when could a probe have stopped the model, and at what cost? Answered from stored rows, without the
model.

`traces` reads a run's stored rollouts and scores their tokens. `stop_settings` defines the settings tried: the probe above
several scores for several tokens, random directions likewise, a fixed length, and an answer that has converged. `sweep`
finds where each setting would have stopped every rollout, with the same function that a server uses (`roentgen.stop_rule`),
and judges the text up to there. `findings` computes accuracy against tokens: each kind's setting is chosen on half of the
problems and evaluated on the other half. `page` shows the results.
"""

from probes.stopping.findings import Chosen, LiveFinding, StopFinding, StopReport, live_finding, summarize_stops
from probes.stopping.page import render_page
from probes.stopping.stop_settings import Setting, make_settings
from probes.stopping.sweep import Reading, Stop, sweep
from probes.stopping.traces import StopTrace, read_traces

__all__ = [
    "Chosen",
    "LiveFinding",
    "Reading",
    "Setting",
    "Stop",
    "StopFinding",
    "StopReport",
    "StopTrace",
    "live_finding",
    "make_settings",
    "read_traces",
    "render_page",
    "summarize_stops",
    "sweep",
]
