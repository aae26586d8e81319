"""The run directory: what an evaluation leaves on disk, and how it is read back.

    RUN/
      config.json                  all that is needed to run it again; written once
      samples.jsonl                the record: append-only, a line per sample, fsynced; the source of truth
      summary.json  dataset.jsonl  report.html
      samples/gsm8k_0001.json  trajectories/gsm8k_0001.jsonl  agent_states/gsm8k_0001.json
      probes/<label>/              what `roentgen probe train` found

Everything but config.json and samples.jsonl can be made again from those two. A module a concern:

    sample     one attempt at one problem
    record     samples.jsonl: appended durably, read line by line
    run        the directory and its config.json
    questions  which samples are attempts at the same problem
"""

from roentgen.runs.questions import Posed, same_question, same_template
from roentgen.runs.record import Recorder, RunError, Samples
from roentgen.runs.run import Run, RunConfig, find_unfinished, rewrite
from roentgen.runs.sample import RolloutRef, Sample, Turn

__all__ = [
    "Posed",
    "Recorder",
    "RolloutRef",
    "Run",
    "RunConfig",
    "RunError",
    "Sample",
    "Samples",
    "Turn",
    "find_unfinished",
    "rewrite",
    "same_question",
    "same_template",
]
