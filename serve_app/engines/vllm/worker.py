"""vLLM's worker on a GPU: nnsight's, which observes whole batches and writes what it captures to the store by itself.

vLLM loads the class by its name, in the process that has the model. Its methods are called by name, through vLLM's
`collective_rpc`, between two steps: they must not wait. With tensor parallelism every rank runs the same observers, because
gathering what is split takes all of them; the values are whole on each (`fragments`), and the first one keeps and stores rows.
"""

import logging
from concurrent.futures import Future
from typing import Any

from nnsight.modeling.vllm.model_runners.GPUModelRunner import NNsightGPUModelRunner
from nnsight.modeling.vllm.workers.GPUWorker import NNsightGPUWorker
from vllm.v1.worker.gpu_worker import Worker

from roentgen.store import StoreWriter
from serve_app.capture.rows import UncapturableError
from serve_app.engines.storage import Stored, write
from serve_app.engines.vllm.collecting import Collector, LostRowsError
from serve_app.engines.vllm.fragments import OrderedFragments
from serve_app.engines.vllm.hook_points import Verified, candidates, describe_modules, tap_at, verify
from serve_app.engines.vllm.lifetime import EndsWithReplica
from serve_app.engines.vllm.observer import BatchInterleaver, BatchWorkers, Norms, Watched
from serve_app.engines.vllm.orders import Exchange, Report, pack, unpack

log = logging.getLogger(__name__)


class CapturingRunner(NNsightGPUModelRunner):
    """nnsight's model runner, with one observer of the whole batch in place of a worker per request."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model and wrap it."""
        super().load_model(*args, **kwargs)
        interleaver = self.nnsight_model.interleaver
        interleaver.__class__ = BatchInterleaver
        interleaver.fragments = OrderedFragments(interleaver.fragments)
        self.collector = Collector()
        self.nnsight_requests = BatchWorkers(lambda: self.requests, self.collector)

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
        """Run a step, and give its requests their rows."""
        output = super().execute_model(scheduler_output, intermediate_tensors)
        self.nnsight_requests.end_step()
        return output


class Capturing(EndsWithReplica):
    """What the replica asks of a worker, beside what vLLM does. Mixed into a worker class."""

    model_runner: Any
    rank: int

    def roentgen_open(self, store: str) -> None:
        """Open the store for writing, if this is the rank that writes.

        Raises:
            StoreError: if nothing can be written there.
        """
        collector = self.model_runner.collector
        self.model_runner.nnsight_requests.keeps = self.rank == 0
        self._writer = StoreWriter(store, expecting=lambda: collector.held > 0) if self.rank == 0 else None
        self._pending: dict[str, Future[Stored]] = {}

    def roentgen_modules(self) -> bytes:
        """Describe the model's modules (`hook_points.Modules`)."""
        model = self.model_runner.get_model()
        paths = [path for path, _ in model.named_modules()]
        packed = getattr(model, "packed_modules_mapping", None) or {}
        return pack(describe_modules(paths, packed, type(model).__name__))

    def roentgen_watch(self, places: list[str]) -> None:
        """Keep what the requests of the next steps show of the candidates for hook points, and the rows' norms at places.

        Args:
            places: modules' paths and sides.
        """
        model = self.model_runner.get_model()
        modules = describe_modules([path for path, _ in model.named_modules()], {}, "")
        taps, checks = candidates(modules)
        self.model_runner.nnsight_requests.watched = [
            Watched({**taps, **checks}),
            Norms({place: tap_at(place) for place in places}),
        ]

    def roentgen_verify(self, n_layers: int, n_experts: int) -> bytes:
        """Check the candidates on what has been seen since `roentgen_watch`; returns `Verified`.

        Args:
            n_layers: decoder layers.
            n_experts: 0 for none.
        """
        workers = self.model_runner.nnsight_requests
        (candidate, norms), workers.watched = workers.watched, []
        wrong = verify(candidate.seen(), n_layers, n_experts or None)
        return pack(Verified(wrong, {place: found.tolist() for place, found in norms.seen().items()}))

    def roentgen_exchange(self, message: bytes) -> bytes | None:
        """Store and forget jobs' rows as an `Exchange` says; returns a `Report`, on the rank that writes."""
        exchange, collector = unpack(message, Exchange), self.model_runner.collector
        if self._writer is None:
            for job_id in (*exchange.keep, *exchange.forget):
                collector.forget(job_id)
            return None
        failed: dict[str, Exception] = {}
        for job_id, entry in exchange.keep.items():
            try:
                rows = collector.take(job_id, entry.sequence.n_rows)
            except (LostRowsError, UncapturableError) as error:
                failed[job_id] = error
                continue
            self._pending[job_id] = write(self._writer, entry, rows)
        for job_id in exchange.forget:
            collector.forget(job_id)
        stored: dict[str, Stored] = {}
        for job_id, future in list(self._pending.items()):
            if not future.done():
                continue
            del self._pending[job_id]
            reason = future.exception()
            if isinstance(reason, Exception):
                failed[job_id] = reason
            else:
                stored[job_id] = future.result()
        return pack(Report(stored, failed, self._writer.has_room, collector.held))

    def roentgen_close(self) -> None:
        """Commit what is pending."""
        if self._writer is not None:
            self._writer.close()


class CapturingWorker(Capturing, NNsightGPUWorker):
    """A GPU's worker."""

    def init_device(self) -> None:
        """Make the device ready, and have its model runner observe."""
        super().init_device()  # which refuses a runner that nnsight cannot instrument
        self.model_runner.__class__ = CapturingRunner


class PlainWorker(EndsWithReplica, Worker):
    """A GPU's worker that captures nothing: vLLM's own."""
