"""vLLM's worker classes on a GPU, which write captured rows to the store themselves.

vLLM imports the class by its name, in the process that has the model. The replica calls its methods by name, through vLLM's
`collective_rpc`, between two steps, so they must not wait. With tensor parallelism every rank runs the same observers, because
gathering sharded values takes all ranks. Each rank has the whole values (`fragments`), and the first rank keeps and stores
rows.
"""

import logging
from concurrent.futures import Future
from typing import Any

from nnsight.modeling.vllm.workers.GPUWorker import NNsightGPUWorker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from roentgen.store import StoreWriter
from serve_app.capture.rows import UncapturableError
from serve_app.engines.storage import StoredActivations, write
from serve_app.engines.vllm.chosen_tokens import ScoresChosenTokens
from serve_app.engines.vllm.collecting import LostRowsError
from serve_app.engines.vllm.eager_runner import EagerRunner
from serve_app.engines.vllm.graph_runner import GraphRunner
from serve_app.engines.vllm.hook_points import Verified, candidates, describe_modules, tap_at, verify
from serve_app.engines.vllm.lifetime import ExitsWithReplica
from serve_app.engines.vllm.recorder import NormRecorder, RowRecorder
from serve_app.engines.vllm.worker_messages import SyncMessage, SyncReply, pack, unpack

log = logging.getLogger(__name__)


class Capturing(ScoresChosenTokens, ExitsWithReplica):
    """Methods that the replica calls, besides vLLM's. A mixin for a worker class."""

    model_runner: Any
    rank: int

    def roentgen_open(self, store: str) -> None:
        """Open the store for writing, on the rank that writes.

        Raises:
            StoreError: if the store cannot be written.
        """
        batch = self.model_runner.batch
        batch.keeps = self.rank == 0
        self._writer = StoreWriter(store, expecting=lambda: batch.collector.n_jobs > 0) if self.rank == 0 else None
        self._pending: dict[str, Future[StoredActivations]] = {}

    def roentgen_modules(self) -> bytes:
        """Return the model's modules (`hook_points.Modules`), or the reason why the server cannot start with them."""
        load_error = getattr(self.model_runner, "load_error", None)
        if load_error is not None:
            return pack(load_error)
        model = self.model_runner.get_model()
        paths = [path for path, _ in model.named_modules()]
        packed = getattr(model, "packed_modules_mapping", None) or {}
        try:
            return pack(describe_modules(paths, packed, type(model).__name__))
        except ValueError as error:
            return pack(str(error))

    def roentgen_record(self, locations: list[str]) -> None:
        """Record the next steps: the rows of candidates for hook points, and the norms of rows at some locations.

        Args:
            locations: each a module's path and a side.
        """
        model = self.model_runner.get_model()
        modules = describe_modules([path for path, _ in model.named_modules()], {}, "")
        taps, checks = candidates(modules)
        recorders = [RowRecorder({**taps, **checks}), NormRecorder({place: tap_at(place) for place in locations})]
        self.model_runner.batch.start_recording(recorders)

    def roentgen_verify(self, n_layers: int, n_experts: int) -> bytes:
        """Verify the candidates on the steps since `roentgen_record`; returns `Verified`.

        Args:
            n_layers: number of decoder layers.
            n_experts: number of experts; 0 for none.
        """
        candidate, norms = self.model_runner.batch.stop_recording()
        wrong = verify(candidate.seen(), n_layers, n_experts or None)
        return pack(Verified(wrong, {place: found.tolist() for place, found in norms.seen().items()}))

    def roentgen_sync(self, packed: bytes) -> bytes | None:
        """Store and drop jobs' rows as a `SyncMessage` says; returns a `SyncReply` on the rank that writes."""
        message, collector = unpack(packed, SyncMessage), self.model_runner.batch.collector
        if self._writer is None:
            for job_id in (*message.keep, *message.forget):
                collector.forget(job_id)
            return None
        failed: dict[str, Exception] = {}
        for job_id, entry in message.keep.items():
            try:
                rows = collector.take(job_id, entry.sequence.token_ids[: entry.sequence.n_rows])
            except (LostRowsError, UncapturableError) as error:
                failed[job_id] = error
                continue
            self._pending[job_id] = write(self._writer, entry, rows)
        for job_id in message.forget:
            collector.forget(job_id)
        stored: dict[str, StoredActivations] = {}
        for job_id, future in list(self._pending.items()):
            if not future.done():
                continue
            del self._pending[job_id]
            reason = future.exception()
            if isinstance(reason, Exception):
                failed[job_id] = reason
            else:
                stored[job_id] = future.result()
        return pack(SyncReply(stored, failed, self._writer.has_room, collector.n_jobs, collector.prefix_bytes))

    def roentgen_resumed(self, job_ids: list[str]) -> bytes | None:
        """Return, per job, whether the rows of its cached prompt tokens are here, on the rank that writes."""
        if self._writer is None:
            return None
        return pack({job_id: self.model_runner.batch.collector.resumed(job_id) for job_id in job_ids})

    def roentgen_scores(self, job_ids: list[str]) -> bytes | None:
        """Return the new scores of these jobs' probes, on the rank that writes."""
        return None if self._writer is None else pack(self.model_runner.batch.collector.scores(job_ids))

    def roentgen_close(self) -> None:
        """Commit all pending rows."""
        if self._writer is not None:
            self._writer.close()


class CapturingInGraph(Capturing):
    """Methods that the replica calls on a worker whose model has taps in its graph."""

    def roentgen_compare(self) -> bytes:
        """Compare the taps' rows since `roentgen_verify` with the rows that hooks read before; returns the error per key."""
        return pack(self.model_runner.batch.errors())


class EagerWorker(Capturing, NNsightGPUWorker):
    """A GPU worker whose model runs module by module."""

    def init_device(self) -> None:
        """Initialize the device, and replace the model runner's class."""
        super().init_device()  # rejects a runner that nnsight cannot instrument
        self.model_runner.__class__ = EagerRunner


class GraphWorker(CapturingInGraph, Worker):
    """A GPU worker whose model has taps in its graph."""

    def init_device(self) -> None:
        """Initialize the device, and replace the model runner's class."""
        super().init_device()
        take_over(self.model_runner, GPUModelRunner, GraphRunner)


class PlainWorker(ScoresChosenTokens, ExitsWithReplica, Worker):
    """A GPU worker that captures nothing: vLLM's own."""


def take_over(runner: GPUModelRunner, known: type[GPUModelRunner], ours: type[GPUModelRunner]) -> None:
    """Change the class of a model runner to one of ours.

    Raises:
        NotImplementedError: if it is not of the class that ours extends.
    """
    if type(runner) is not known:
        raise NotImplementedError(f"only vLLM's {known.__name__} is supported, not {type(runner)}")
    runner.__class__ = ours
