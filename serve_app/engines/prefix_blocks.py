"""Which of a prompt's tokens need not be read again, in both engines: the names of blocks, and what rows of them are needed.

A block is some tokens of a sequence. It is named by a hash of all tokens up to its end and of whatever else its values depend
on: what is added to these tokens (steering that touches later ones only does not count), and the salt of the request, by which
clients keep apart. Model, adapter and dtype need no place in the name, since what is kept belongs to one engine and ends with
it.
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
"""Position policies that keep every row of a stretch."""


class PromptRequest(Protocol):
    """What a job asks for, as far as it decides over its prompt."""

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt's tokens."""

    @property
    def capture(self) -> CapturePlan | None:
        """What is kept."""

    @property
    def steering(self) -> Sequence[SteeringVector]:
        """What is added."""

    @property
    def probes(self) -> Sequence[RequestProbe]:
        """What rows are scored with."""

    @property
    def cache_salt(self) -> str | None:
        """What is found has to have been read under the same."""


def name_blocks(job: PromptRequest, tokens: Sequence[int], size: int, known: Sequence[bytes] = ()) -> list[bytes]:
    """Name the whole blocks of a job's sequence.

    Args:
        job: whose salt and steering count.
        tokens: its prompt, or more of its sequence.
        size: tokens of a block.
        known: names of its first blocks.
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
    """Return where a job has to have rows of some positions of its prompt."""
    taps = {scorer.tap for scorer in job.probes}
    plan = job.capture
    if plan is not None and plan.positions.policy != "last" and plan.kept(len(job.prompt_ids), span.start, span.stop):
        taps |= set(plan.taps.values())
    return taps


def filler_plan(job: PromptRequest, stop: int) -> CapturePlan | None:
    """Return what is to be captured besides, so that blocks get all rows that a job like this one needs; None for nothing.

    Args:
        job: the job.
        stop: where the prompt's last whole block ends.
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
