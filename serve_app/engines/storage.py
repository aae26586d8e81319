"""Where finished generations' rows go, and when they are durable.

An engine that has its model in this process hands rows over, and a `LocalStorage` writes them. One whose model runs in workers
hands over a ticket, and its own `Storage` has the worker that holds the rows write them (`engines.vllm.worker_storage`). Both end in
`write`, in the process that has the rows; what crosses to the replica is a `StoredActivations`.
"""

import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from roentgen.store import CapturedRollout, NonFiniteRowsError, Receipt, StoreError, StoreWriter
from roentgen.store.schema import check_finite
from serve_app.capture.rows import CapturedRows
from serve_app.engines.protocol import Finished, NonFiniteLogitsError
from serve_app.engines.rollout_entry import RolloutEntry, describe, join


@dataclass(frozen=True)
class StoredActivations:
    """A generation's committed activations."""

    reply: dict[str, Any]
    """What the reply says of them."""
    nbytes: int
    """Their size."""
    seconds: float
    """How long the commit took."""


@dataclass(frozen=True)
class Done:
    """A finished choice; `stored` is there if activations were asked for, and then durable."""

    finished: Finished
    stored: StoredActivations | None


class Storage(Protocol):
    """Stores what engines have captured."""

    @property
    def has_room(self) -> bool:
        """Whether more may be captured now: the disk may be slower than the model."""

    def keep(self, entry: RolloutEntry, finished: Finished) -> "Future[StoredActivations]":
        """Store a finished generation; the future completes when it is durable, or fails with a `StoreError`.

        Args:
            entry: what was said.
            finished: its rows, or where they are held.
        """


class LocalStorage:
    """Stores rows that are in this process, through its writer."""

    def __init__(self, writer: StoreWriter) -> None:
        self._writer = writer

    @property
    def has_room(self) -> bool:
        """Whether more may be captured now."""
        return self._writer.has_room

    def keep(self, entry: RolloutEntry, finished: Finished) -> "Future[StoredActivations]":
        """Store a finished generation."""
        assert finished.captured is not None
        return write(self._writer, entry, finished.captured)


def rollout_of(entry: RolloutEntry, captured: CapturedRows) -> Rollout:
    """Join what was said to what was captured, if the model had probabilities to choose by.

    Raises:
        NonFiniteRowsError: if it had none, and its rows say where that begins.
        NonFiniteLogitsError: if it had none, and the rows that were asked for are finite.
    """
    rollout = join(entry, captured)
    chosen = np.delete(entry.logprobs, entry.forced)[entry.sequence.n_prompt :]
    if not entry.allow_non_finite and np.isnan(chosen).any():
        check_finite(rollout)
        raise NonFiniteLogitsError
    return rollout


def write(writer: StoreWriter, entry: RolloutEntry, captured: CapturedRows) -> "Future[StoredActivations]":
    """Queue a generation for writing; the future completes on the writer's thread."""
    start = time.monotonic()
    stored: Future[StoredActivations] = Future()
    try:
        rollout = rollout_of(entry, captured)
        receipt = writer.submit(rollout)
    except (NonFiniteLogitsError, NonFiniteRowsError) as error:
        stored.set_exception(error)
        return stored
    except Exception as error:  # noqa: BLE001 - an engine's thread calls this: the failure is this generation's alone
        stored.set_exception(StoreError(f"the activations could not be stored: {error}"))
        return stored

    def committed(done: "Future[Receipt]") -> None:
        try:
            reply = describe(rollout, done.result(), entry.delivery)
        except NonFiniteRowsError as error:
            stored.set_exception(error)
            return
        except Exception as error:  # noqa: BLE001 - on the writer's thread: raised here, nobody would hear of it
            stored.set_exception(StoreError(f"the activations could not be stored: {error}"))
            return
        stored.set_result(StoredActivations(reply, rollout.nbytes, time.monotonic() - start))

    receipt.add_done_callback(committed)
    return stored
