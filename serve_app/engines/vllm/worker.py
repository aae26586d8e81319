"""vLLM's workers on a GPU, which write what they capture to the store by themselves.

vLLM loads the class by its name, in the process that has the model. Its methods are called by name, through vLLM's
`collective_rpc`, between two steps: they must not wait. With tensor parallelism every rank runs the same observers, because
gathering what is split takes all of them; the values are whole on each (`fragments`), and the first one keeps and stores rows.
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
from serve_app.engines.vllm.lifetime import EndsWithReplica
from serve_app.engines.vllm.recorder import NormRecorder, RowRecorder
from serve_app.engines.vllm.worker_messages import SyncMessage, SyncReply, pack, unpack

log = logging.getLogger(__name__)


class Capturing(ScoresChosenTokens, EndsWithReplica):
    """What the replica asks of a worker, beside what vLLM does. Mixed into a worker class."""

    model_runner: Any
    rank: int

    def roentgen_open(self, store: str) -> None:
        """Open the store for writing, if this is the rank that writes.

        Raises:
            StoreError: if nothing can be written there.
        """
        batch = self.model_runner.batch
        batch.keeps = self.rank == 0
        self._writer = StoreWriter(store, expecting=lambda: batch.collector.n_jobs > 0) if self.rank == 0 else None
        self._pending: dict[str, Future[StoredActivations]] = {}

    def roentgen_modules(self) -> bytes:
        """Describe the model's modules (`hook_points.Modules`), or say why the server cannot start with them."""
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

    def roentgen_record(self, places: list[str]) -> None:
        """Keep what the requests of the next steps show of the candidates for hook points, and the rows' norms at places.

        Args:
            places: modules' paths and sides.
        """
        model = self.model_runner.get_model()
        modules = describe_modules([path for path, _ in model.named_modules()], {}, "")
        taps, checks = candidates(modules)
        recorders = [RowRecorder({**taps, **checks}), NormRecorder({place: tap_at(place) for place in places})]
        self.model_runner.batch.start_recording(recorders)

    def roentgen_verify(self, n_layers: int, n_experts: int) -> bytes:
        """Check the candidates on what has been seen since `roentgen_record`; returns `Verified`.

        Args:
            n_layers: decoder layers.
            n_experts: 0 for none.
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
        """Say of jobs whether the rows are here of the tokens that vLLM has found in its cache, on the rank that writes."""
        if self._writer is None:
            return None
        return pack({job_id: self.model_runner.batch.collector.resumed(job_id) for job_id in job_ids})

    def roentgen_scores(self, job_ids: list[str]) -> bytes | None:
        """Return what these jobs' probes have given since the last time, on the rank that writes."""
        return None if self._writer is None else pack(self.model_runner.batch.collector.scores(job_ids))

    def roentgen_close(self) -> None:
        """Commit what is pending."""
        if self._writer is not None:
            self._writer.close()


class CapturingInGraph(Capturing):
    """What the replica asks of a worker whose model has taps in its graph."""

    def roentgen_compare(self) -> bytes:
        """Compare what the taps have shown since `roentgen_verify` with what hooks had shown before; returns errors per key."""
        return pack(self.model_runner.batch.errors())


class EagerWorker(Capturing, NNsightGPUWorker):
    """A GPU's worker, whose model runs module by module."""

    def init_device(self) -> None:
        """Make the device ready, and have its model runner observe."""
        super().init_device()  # which refuses a runner that nnsight cannot instrument
        self.model_runner.__class__ = EagerRunner


class GraphWorker(CapturingInGraph, Worker):
    """A GPU's worker, whose model has taps in its graph."""

    def init_device(self) -> None:
        """Make the device ready, and have its model runner tap."""
        super().init_device()
        take_over(self.model_runner, GPUModelRunner, GraphRunner)


class PlainWorker(ScoresChosenTokens, EndsWithReplica, Worker):
    """A GPU's worker that captures nothing: vLLM's own."""


def take_over(runner: GPUModelRunner, known: type[GPUModelRunner], ours: type[GPUModelRunner]) -> None:
    """Make a model runner one of ours.

    Raises:
        NotImplementedError: if it is not the runner that ours is made of.
    """
    if type(runner) is not known:
        raise NotImplementedError(f"only vLLM's {known.__name__} is known, not {type(runner)}")
    runner.__class__ = ours
