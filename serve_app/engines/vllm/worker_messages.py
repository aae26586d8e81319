"""Messages between the replica and vLLM's workers, beside tokens.

They are pickled, because both sides run this program on one machine. A request carries a `CaptureRequest`, so the worker knows
from its first token what to capture. After the request has ended, the replica sends a `SyncMessage` that names the rows to
store and the rows to drop. It receives a `SyncReply`, which holds receipts and never tensors.
"""

import io
import pickle
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from serve_app.capture.probe_scores import RequestProbe
from serve_app.capture.rows import CapturePlan
from serve_app.capture.steering import SteeringVector
from serve_app.engines.probe_stopping import Stopping
from serve_app.engines.rollout_metadata import RolloutMetadata
from serve_app.engines.storage import StoredActivations

EXTRA_ARGS_KEY = "roentgen"
"""Key of the packed `CaptureRequest` in vLLM's `extra_args`."""

UNSCORED, CHOSEN_ONLY = 0, 1
"""Values of `SamplingParams.logprobs` that `chosen_tokens` gives a meaning: no log-probabilities, or only the chosen
token's. Larger numbers mean what they mean to vLLM."""

TAPS_KEY = "roentgen_taps"
"""Key of the declared taps in vLLM's `additional_config`, which is part of its compile cache's key."""

VECTORS_PER_REQUEST = 32
"""Largest number of different vectors that one request may add."""

T = TypeVar("T")


@dataclass(frozen=True)
class CaptureRequest:
    """What a worker captures, steers and scores for one job."""

    job_id: str
    """The engine's id of the job."""
    capture: CapturePlan | None
    """Which rows to keep; None for none."""
    steering: tuple[SteeringVector, ...] = ()
    """Vectors to add to its rows."""
    probes: tuple[RequestProbe, ...] = ()
    """Probes to score its rows with."""
    cache_salt: str | None = None
    """The client's cache salt: rows of its prompt are reused only by requests with the same salt."""
    stopping: Stopping | None = None
    """When probe scores stop the generation; None for never."""
    end: int | None = None
    """A token that ends the generation; None if there is none."""


@dataclass(frozen=True)
class SyncMessage:
    """Which of a worker's rows to store and which to drop."""

    keep: dict[str, RolloutMetadata] = field(default_factory=dict)
    """Jobs to store, by job id, with everything about the rollout but its rows."""
    forget: frozenset[str] = frozenset()
    """Jobs whose rows are dropped."""


@dataclass(frozen=True)
class SyncReply:
    """A worker's reply: what has happened since the last sync."""

    stored: dict[str, StoredActivations]
    """Jobs whose rows are committed."""
    failed: dict[str, Exception]
    """Jobs whose rows are missing or could not be written, each with the error."""
    has_room: bool
    """Whether the store's writer accepts more rows now."""
    n_jobs: int
    """Number of jobs whose rows the worker holds."""
    prefix_bytes: int
    """Bytes of prompt rows that the worker caches for prompts with the same prefix."""


class _Pickler(pickle.Pickler):
    """Pickles tensors as NumPy arrays.

    torch would write an archive for each, which takes 0.1 ms to write and as long to read.
    """

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not torch.Tensor or value.dtype == torch.bfloat16:
            return NotImplemented
        return torch.from_numpy, (value.detach().cpu().numpy(),)


def pack(value: Any) -> bytes:
    """Serialize a message."""
    written = io.BytesIO()
    _Pickler(written, pickle.HIGHEST_PROTOCOL).dump(value)
    return written.getvalue()


def unpack(data: bytes, kind: type[T]) -> T:
    """Deserialize a message of a known type."""
    value = pickle.loads(data)
    assert isinstance(value, kind)
    return value
