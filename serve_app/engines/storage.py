"""Stores the captured rows of finished generations, and reports when they are committed.

An engine with its model in this process returns rows, and a `LocalStorage` writes them. An engine whose model runs in workers
returns a reference to rows, and its own `Storage` has the worker write them (`engines.vllm.worker_storage`). Both end in
`write`, in the process that has the rows. Only a `StoredActivations` returns to the replica.
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
from serve_app.engines.rollout_metadata import RolloutMetadata, describe, join


@dataclass(frozen=True)
class StoredActivations:
    """A generation's committed activations."""

    reply: dict[str, Any]
    """The reply's `activations` object."""
    nbytes: int
    """Size of the rows in bytes."""
    seconds: float
    """Duration of the commit."""


@dataclass(frozen=True)
class Done:
    """A finished choice. `stored` is there if the request asked for activations, which are then committed."""

    finished: Finished
    stored: StoredActivations | None


class Storage(Protocol):
    """Stores the rows that engines have captured."""

    @property
    def has_room(self) -> bool:
        """Whether more rows may be captured now. If the disk is slower than the model, capture requests have to wait."""

    def keep(self, entry: RolloutMetadata, finished: Finished) -> "Future[StoredActivations]":
        """Store a finished generation; the future completes when it is committed, or fails with a `StoreError`.

        Args:
            entry: everything about it but its rows.
            finished: the engine's result, with its rows or a reference to them.
        """


class LocalStorage:
    """Stores rows that are in this process, through this process's writer."""

    def __init__(self, writer: StoreWriter) -> None:
        self._writer = writer

    @property
    def has_room(self) -> bool:
        """Whether more rows may be captured now."""
        return self._writer.has_room

    def keep(self, entry: RolloutMetadata, finished: Finished) -> "Future[StoredActivations]":
        """Store a finished generation."""
        assert finished.captured is not None
        return write(self._writer, entry, finished.captured)


def rollout_of(entry: RolloutMetadata, captured: CapturedRows) -> CapturedRollout:
    """Combine an entry and its captured rows into a rollout, and check its logits.

    Raises:
        NonFiniteRowsError: if the logits were not finite and some captured row is not; it says where that begins.
        NonFiniteLogitsError: if the logits were not finite although all captured rows are.
    """
    rollout = join(entry, captured)
    chosen = np.delete(entry.logprobs, entry.forced)[entry.sequence.n_prompt :]
    if not entry.allow_non_finite and np.isnan(chosen).any():
        check_finite(rollout)
        raise NonFiniteLogitsError
    return rollout


def write(writer: StoreWriter, entry: RolloutMetadata, captured: CapturedRows) -> "Future[StoredActivations]":
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
        except Exception as error:  # noqa: BLE001 - on the writer's thread, where nothing would report it
            stored.set_exception(StoreError(f"the activations could not be stored: {error}"))
            return
        stored.set_result(StoredActivations(reply, rollout.nbytes, time.monotonic() - start))

    receipt.add_done_callback(committed)
    return stored
