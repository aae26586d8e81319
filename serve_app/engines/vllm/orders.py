"""What goes between the replica and vLLM's workers beside tokens: pickled, because both are this program on one machine.

A request carries an `Order`, so the worker knows from its first token what to do. After it has ended, the replica sends an
`Exchange`, which names what to store and what to forget, and takes back a `Report`: receipts, never tensors.
"""

import io
import pickle
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from serve_app.capture.rows import CapturePlan
from serve_app.capture.scoring import Scorer
from serve_app.capture.steering import Addition
from serve_app.engines.rollout import Entry
from serve_app.engines.stopping import Stopping
from serve_app.engines.storage import Stored

EXTRA = "roentgen"
"""The key of an order in vLLM's `extra_args`."""

UNSCORED, CHOSEN_ONLY = 0, 1
"""What `SamplingParams.logprobs` says to `chosen_tokens`: nothing is asked for, or only the chosen token's log-probability.
Larger numbers mean what they mean to vLLM."""

DECLARED = "roentgen_taps"
"""The key of the declared taps in vLLM's `additional_config`, which is a part of its compile cache's key."""

VECTORS_PER_REQUEST = 32
"""The most different vectors that one request adds."""

T = TypeVar("T")


@dataclass(frozen=True)
class Order:
    """What a worker does for one job."""

    job_id: str
    """The engine's name for it."""
    capture: CapturePlan | None
    """What to keep, None for nothing."""
    steering: tuple[Addition, ...] = ()
    """What to add to its rows."""
    probes: tuple[Scorer, ...] = ()
    """What to score them with."""
    cache_salt: str | None = None
    """The client's, under which rows of its prompt are kept for others."""
    stopping: Stopping | None = None
    """What the scores are to do, None for nothing."""
    end: int | None = None
    """A token that ends the generation, None if there is none."""


@dataclass(frozen=True)
class Exchange:
    """What the replica wants of a worker's rows."""

    keep: dict[str, Entry] = field(default_factory=dict)
    """Jobs to store, with what was said."""
    forget: frozenset[str] = frozenset()
    """Jobs whose rows nobody wants."""


@dataclass(frozen=True)
class Report:
    """What has happened since the last exchange."""

    stored: dict[str, Stored]
    """Jobs whose rows are durable."""
    failed: dict[str, Exception]
    """Jobs whose rows are not there or could not be written, and why."""
    has_room: bool
    """Whether the store's writer keeps up."""
    held: int
    """Jobs whose rows the worker holds."""
    kept: int
    """Bytes of prompts' rows that it keeps for prompts that begin in the same way."""


class _Pickler(pickle.Pickler):
    """Writes tensors as numpy's arrays, wherever they are: torch would make an archive of each, which takes a tenth of a
    millisecond, and reading it as long again."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not torch.Tensor or value.dtype == torch.bfloat16:
            return NotImplemented
        return torch.from_numpy, (value.detach().cpu().numpy(),)


def pack(value: Any) -> bytes:
    """Spell an order, an exchange or a report."""
    written = io.BytesIO()
    _Pickler(written, pickle.HIGHEST_PROTOCOL).dump(value)
    return written.getvalue()


def unpack(data: bytes, kind: type[T]) -> T:
    """Read one back."""
    value = pickle.loads(data)
    assert isinstance(value, kind)
    return value
