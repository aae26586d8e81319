"""The run directory: what an evaluation leaves on disk, and how it is read.

    RUN/
      config.json                  everything needed to run it again; written once
      samples.jsonl                the record: append-only, one line per sample, fsynced; the source of truth
      summary.json  dataset.jsonl  report.html
      samples/gsm8k_0001.json  trajectories/gsm8k_0001.jsonl  agent_states/gsm8k_0001.json
      probes/<label>/              the results of `roentgen probe train`

Everything except config.json and samples.jsonl can be regenerated from these two. The modules:

    sample     one attempt at one problem
    record     samples.jsonl: appended durably, read line by line
    config     config.json
    run        the directory, read
    table      its samples as a table
    stored     the rows in the store that belong to its samples
    writing    what an evaluation writes of it
    questions  which samples are attempts at the same problem
    failures   failed samples, counted by kind
    run_comparison    two runs on the same problems
"""

from roentgen.runs.config import RunConfig
from roentgen.runs.questions import Posed, same_question, same_template
from roentgen.runs.record import Recorder, RunError, Samples
from roentgen.runs.run import Run, find_unfinished
from roentgen.runs.sample import VERDICTS, RolloutRef, Sample, Turn
from roentgen.runs.writing import (
    create_named_run,
    create_run,
    recording,
    remove_if_empty,
    rewrite,
    rewrite_all,
    write_config,
)

__all__ = [
    "VERDICTS",
    "Posed",
    "Recorder",
    "RolloutRef",
    "Run",
    "RunConfig",
    "RunError",
    "Sample",
    "Samples",
    "Turn",
    "create_named_run",
    "create_run",
    "find_unfinished",
    "recording",
    "remove_if_empty",
    "rewrite",
    "rewrite_all",
    "same_question",
    "same_template",
    "write_config",
]
