"""Names the blocks of a prompt for prefix caching, and decides which of their rows a job needs; both engines use it.

A block is a fixed number of consecutive tokens of a sequence. Its name is a hash of all tokens up to its end and of everything
else that its values depend on: the steering of these tokens (steering of later tokens does not count), and the request's salt,
by which clients separate their caches. Model, adapter and dtype are not part of the name, because a cache belongs to one
engine and ends with it.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from roentgen.contract import Positions
from serve_app.capture.probe_scores import RequestProbe
from serve_app.capture.rows import CapturePlan
from serve_app.capture.steering import SteeringVector
from serve_app.capture.structure import Tap

WHOLE_POLICIES = ("all", "prompt", "generated")
"""Position policies that keep every row of a range."""


class PromptRequest(Protocol):
    """The part of a job that concerns the caching of its prompt."""

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt's token ids."""

    @property
    def capture(self) -> CapturePlan | None:
        """Which rows are captured."""

    @property
    def steering(self) -> Sequence[SteeringVector]:
        """Vectors that are added to rows."""

    @property
    def probes(self) -> Sequence[RequestProbe]:
        """Probes that score rows."""

    @property
    def cache_salt(self) -> str | None:
        """Cached tokens are reused only if they were read under the same salt."""


def name_blocks(job: PromptRequest, tokens: Sequence[int], size: int, known: Sequence[bytes] = ()) -> list[bytes]:
    """Return the names of the whole blocks of a job's sequence.

    Args:
        job: its salt and steering count.
        tokens: its prompt, or more of its sequence.
        size: tokens of a block.
        known: names of its first blocks, if they are known.
    """
    names = list(known)
    steering_vectors = [
        (steering_vector, _digest(steering_vector.key.encode() + _bytes(steering_vector.vector)))
        for steering_vector in job.steering
    ]
    last = names[-1] if names else _digest(repr(job.cache_salt).encode())
    for number in range(len(names), len(tokens) // size):
        span = range(number * size, (number + 1) * size)
        steered = [
            (vector, list(wanted))
            for steering_vector, vector in steering_vectors
            if (wanted := steering_vector.wanted(len(job.prompt_ids), span))
        ]
        last = _digest(last + array("q", tokens[span.start : span.stop]).tobytes() + repr(steered).encode())
        names.append(last)
    return names


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


def _bytes(vector: Float[Tensor, "d_model"]) -> bytes:
    return vector.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def needed_taps(job: PromptRequest, span: range) -> set[Tap]:
    """Return the taps whose rows a job needs at some positions of its prompt."""
    taps = {scorer.tap for scorer in job.probes}
    plan = job.capture
    if plan is not None and plan.positions.policy != "last" and plan.kept(len(job.prompt_ids), span.start, span.stop):
        taps |= set(plan.taps.values())
    return taps


def filler_plan(job: PromptRequest, stop: int) -> CapturePlan | None:
    """Return a plan of what to capture in addition, so that blocks have all rows that such a job needs; None for nothing.

    Args:
        job: the job.
        stop: end of the prompt's last whole block.
    """
    plan, whole = job.capture, range(stop)
    taps = {scorer.tap for scorer in job.probes}
    first = 0
    if plan is not None:
        kept = needed_taps(job, whole) - taps
        if plan.positions.policy in WHOLE_POLICIES:
            taps -= set(plan.taps.values()) if plan.kept(len(job.prompt_ids), 0, stop) == whole else set()
        elif plan.positions.policy not in ("last", "last_prompt"):
            first = 0 if taps else plan.first
            taps |= kept
    if not taps or not stop:
        return None
    return CapturePlan({str(tap): tap for tap in taps}, Positions("all"), "model", first=first, stop=stop)
