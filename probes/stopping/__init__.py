"""When could a probe have stopped the model, and what would that have cost? Answered from stored rows, without the model.

`traces` reads a run's stored rollouts and scores their tokens. `settings` are the rules that are tried: the probe above several
scores for several tokens, random directions likewise, a fixed length, and an answer that has not changed. `sweep` finds where
each would have stopped every rollout, with the function that a server stops by (`roentgen.stop_rule`), and has what was said by
then judged. `findings` turns that into accuracy against tokens: each kind's setting is chosen on half of the problems and
reported on the other half. `page` shows it.
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
