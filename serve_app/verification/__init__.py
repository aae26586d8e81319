"""Checks a model's captures against an independent path: what `roentgen verify-capture` runs.

The engine batches, pads, caches and shares forwards between requests, and nnsight reads in the middle of it; a captured row
must not show any of that. So a mix of requests (`mix`) joins and leaves a running engine (`running`), and then, with the
engine closed, each finished rollout runs again: alone, teacher-forced, with no padding, no cache, transformers' own attention
and plain PyTorch hooks (`reference`). What was captured is compared with that row by row, and so are the tokens chosen and
their log-probabilities (`comparison`, `report`). `verify` puts the parts together, `console` prints what comes out.

There is one copy of the weights: the same model serves both paths, one after the other.
"""

from serve_app.verification.console import render
from serve_app.verification.mix import BUILT_IN_PROMPTS, REQUESTS, VerificationError, read_prompts
from serve_app.verification.report import Report
from serve_app.verification.verify import taps_to_verify, verify_capture

__all__ = [
    "BUILT_IN_PROMPTS",
    "REQUESTS",
    "Report",
    "VerificationError",
    "read_prompts",
    "render",
    "taps_to_verify",
    "verify_capture",
]
