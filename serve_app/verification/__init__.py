"""Checks a model's captures against an independent computation; `roentgen verify-capture` runs it.

The engine batches, pads, caches and shares forwards between requests, and nnsight reads values in the middle of them. None of
that may change a captured row. So a mix of requests (`mix`) joins and leaves a running engine (`batch_run`). Then the engine
is closed, and each finished rollout runs again alone: teacher-forced, without padding or cache, with transformers' stock
attention and plain PyTorch hooks (`reference`). Rows, chosen tokens and log-probabilities are compared (`comparison`,
`verification_report`). `verify` runs these steps, and `rendering` formats the report.

There is one copy of the weights: the same model runs both computations, one after the other.
"""

from serve_app.verification.mix import BUILT_IN_PROMPTS, REQUESTS, VerificationError, read_prompts
from serve_app.verification.rendering import render
from serve_app.verification.verification_report import VerificationReport
from serve_app.verification.verify import taps_to_verify, verify_capture

__all__ = [
    "BUILT_IN_PROMPTS",
    "REQUESTS",
    "VerificationError",
    "VerificationReport",
    "read_prompts",
    "render",
    "taps_to_verify",
    "verify_capture",
]
