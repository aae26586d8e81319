"""vLLM's own model runner with taps in its graph: compiled, with CUDA graphs, and unpatched.

Taps are inserted into the model between loading and compiling. Before each forward, the steering vectors of requests are
written to buffers. After it, the captured rows are copied on the forward's stream, before a later step can overwrite them.

When the server starts, the taps are compared once with hooks. One request runs with the compiled forward disabled, so that
hooks see every module (`start_recording`); then the same tokens run through the graph (`errors`). This finds a graph that is
not this model's, such as one that vLLM took from a stale cache, and a module that the compiler left out.
"""

import logging
import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from serve_app.capture.probe_scores import StepScores
from serve_app.capture.rows import StepRows
from serve_app.capture.structure import Tap
from serve_app.engines.memory_budget import HOST_SHARE, PREFIX_SHARE, free_host_memory
from serve_app.engines.vllm.batch import Batch
from serve_app.engines.vllm.forced_tokens import ForcesTokens
from serve_app.engines.vllm.graph_taps import GraphTaps, Sizes, buffer_bytes
from serve_app.engines.vllm.hook_points import declared_taps, describe_modules, terms
from serve_app.engines.vllm.prefix_rows import PrefixRows
from serve_app.engines.vllm.recorder import RowRecorder
from serve_app.engines.vllm.worker_messages import TAPS_KEY, VECTORS_PER_REQUEST

DEVICE_SHARE_OF_TAPS = 0.5
"""Largest share of a GPU's free memory after loading that the taps' buffers may take."""

RowReader = StepRows | StepScores | RowRecorder
"""Reads rows of a step, by stored key."""

log = logging.getLogger(__name__)


class GraphBatch(Batch):
    """The requests of a runner whose model has taps in its graph."""

    def __init__(
        self,
        runner: Any,
        model: nn.Module,
        taps: GraphTaps,
        prefixes: PrefixRows | None = None,
    ) -> None:
        """Create a batch without requests.

        Args:
            runner: vLLM's model runner.
            model: the runner's model.
            taps: the taps in its graph.
            prefixes: caches rows of prompts, if vLLM has a prefix cache.
        """
        super().__init__(runner, next(model.parameters()).device, prefixes)
        self._model = model
        self.taps = taps
        self._failure: Exception | None = None
        self._hooks: ExitStack | None = None
        self._by_hooks = RowRecorder({})

    def scope(self, spans: list[tuple[str, int]]) -> None:
        """Plan the step that is about to run."""
        step = self.lay_out(spans)
        self._failure = None
        try:
            self.taps.steer(step.steering if step is not None else None)
        except ValueError as error:
            log.exception("a step could not be steered")
            self._failure = error

    def end_step(self) -> None:
        """Read the rows of the step whose forward has been launched, and give them to its requests."""
        step, readers = self._step, list[RowReader]()
        if step is not None and self.keeps:
            readers += [reader for reader in (step.rows, step.fills, step.scores) if reader is not None]
        if self._hooks is None:
            readers += self.recorders
        for reader in readers:
            for key, tap in reader.taps.items():
                if (rows := self.taps.rows(tap, self.n_tokens)) is not None:
                    reader(key, rows)
        self.deliver(self._failure)

    def start_recording(self, recorders: list[RowRecorder]) -> None:
        """Run the next steps module by module, and pass every module's values to recorders."""
        super().start_recording([*recorders, RowRecorder({str(tap): tap for tap in self.taps.taps})])
        self._hooks = ExitStack()
        for module in self._model.modules():
            if getattr(module, "do_not_compile", True) is False:
                object.__setattr__(module, "do_not_compile", True)
                self._hooks.callback(object.__setattr__, module, "do_not_compile", False)
        for one in self.recorders:
            for key, tap in one.taps.items():
                self._hooks.callback(_hook(self._model.get_submodule(tap.module), tap, partial(self._show, one, key)))

    def stop_recording(self) -> list[RowRecorder]:
        """Run steps through the graph again, and record them for comparison with the recorded steps. Returns the recorders."""
        assert self._hooks is not None
        self._hooks.close()
        self._hooks = None
        *recorders, self._by_hooks = super().stop_recording()
        self.recorders = [RowRecorder(self._by_hooks.taps)]
        return recorders

    def errors(self) -> dict[str, float]:
        """Return the median error of each tap's rows since then, by location (`median_error`)."""
        (shown,) = super().stop_recording()
        there, here = self._by_hooks.seen(), shown.seen()
        return {place: median_error(here.get(place), rows) for place, rows in there.items()}

    def _show(self, recorder: RowRecorder, key: str, tap: Tap, value: Any) -> None:
        try:
            found = terms(value, tap)
        except TypeError:
            return  # a module that passes no tensor has no rows
        recorder(key, *(tensor[: self.n_tokens] for tensor in found))


def _hook(module: nn.Module, tap: Tap, look: Callable[[Tap, Any], None]) -> Callable[[], None]:
    """Call a function with a module's input or output; returns a function that removes the hook."""
    if tap.side == "output":
        return module.register_forward_hook(lambda _, __, value: look(tap, value)).remove
    taken = module.register_forward_pre_hook(
        lambda _, args, kwargs: look(tap, (*args, *kwargs.values())), with_kwargs=True
    )
    return taken.remove


def median_error(rows: Float[Tensor, "rows width"] | None, expected: Float[Tensor, "rows width"]) -> float:
    """Return the relative error of the median row; infinite if rows are missing."""
    if rows is None or rows.shape != expected.shape:
        return math.inf
    expected = expected.float()
    return float(((rows.float() - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-9)).median())


class GraphRunner(ForcesTokens, GPUModelRunner):
    """vLLM's model runner with taps in the graph. A mixin for the runner of a device.

    Attributes:
        load_error: why there are no taps, if their buffers do not fit. vLLM loses an exception that a worker raises while
            loading, so the replica asks for it.
    """

    load_error: str | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, and insert the declared taps."""
        super().load_model(*args, **kwargs)
        model = self.get_model()
        modules = describe_modules([path for path, _ in model.named_modules()], {}, type(model).__name__)
        declared, _ = declared_taps(self.vllm_config.additional_config[TAPS_KEY], modules)
        scheduler = self.vllm_config.scheduler_config
        sizes = Sizes(
            width=self.model_config.get_hidden_size(),
            tokens=scheduler.max_num_batched_tokens,
            vectors=scheduler.max_num_seqs * VECTORS_PER_REQUEST,
        )
        needed, room = buffer_bytes(model, declared.values(), sizes), self._room()
        log.info("%d taps of %d tokens: their buffers take %.2f GB", len(declared), sizes.tokens, needed / 1e9)
        if needed > room:
            self.load_error = (
                f"taps: {len(declared)} taps of {sizes.tokens:,} tokens take {needed / 1e9:.1f} GB; {room / 1e9:.1f} GB of the "
                "memory beside the weights may be used. Tap fewer hook points or layers (--taps), or lower --max-prefill-tokens"
            )
            declared = {}
        prefixes = None
        if self.cache_config.enable_prefix_caching:
            prefixes = PrefixRows(self.cache_config.block_size, int(free_host_memory() * PREFIX_SHARE))
        self.batch = GraphBatch(self, model, GraphTaps(model, declared.values(), sizes), prefixes)

    def _room(self) -> int:
        """Return the bytes that buffers may take, now that the weights are loaded: keys and values need the rest."""
        if self.device.type == "cpu":
            return int(free_host_memory() * HOST_SHARE)
        free, total = torch.cuda.mem_get_info(self.device)
        kept_back = total * (1 - self.cache_config.gpu_memory_utilization)
        return int((free - kept_back) * DEVICE_SHARE_OF_TAPS)

    def _update_states(self, scheduler_output: Any) -> Any:
        corrections = super()._update_states(scheduler_output)
        self.batch.end(set(scheduler_output.finished_req_ids))
        self.batch.begin(scheduler_output.scheduled_new_reqs)
        # The batch's order, not the scheduler's: the batch is condensed after the scheduler has counted tokens.
        tokens = scheduler_output.num_scheduled_tokens
        self.batch.scope([(request, tokens[request]) for request in self.input_batch.req_ids if request in tokens])
        return corrections

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
        """Run a step, and give its requests their rows."""
        output = super().execute_model(scheduler_output, intermediate_tensors)
        self.batch.end_step()
        return output
